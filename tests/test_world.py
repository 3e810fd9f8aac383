"""The instruction world: exact numbers against enumeration, the committed files against the generator, splits, tokens."""

import math
import random
import re
import shutil
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kd_notes.data.grammar as grammar_module
import kd_notes.data.world as world_module
from kd_notes.core import UserError
from kd_notes.data.quality import near_duplicate_share
from kd_notes.data.grammar import (
    answer_entropy,
    Answers,
    choice,
    Choice,
    count_answers,
    draw,
    draw_villages,
    END,
    enumerate_answers,
    likeliest,
    log_prob,
    mean_length,
    next_symbols,
    text_of,
    villages,
    words_of,
)
from kd_notes.data.world import (
    answer_tokens,
    answers,
    draw_corpus,
    draw_row,
    draw_split,
    entropy,
    generator_logprobs,
    label_probabilities,
    load_corpus,
    load_world,
    load_world_tokenizer,
    log_likelihood,
    profile,
    read_prompt,
    sample_answer,
    split_of,
    token_answers,
    word_tokens,
)

torch.set_num_threads(1)
ROWS = {split: load_world(split) for split in world_module.SPLITS}


def grammars(depth=3):
    "Random grammars over three words, so that many derivations give the same text."
    leaf = st.sampled_from(["a", "b", "a b", "c ."])
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.lists(st.tuples(st.integers(1, 5), inner), min_size=2, max_size=3).map(choice),
        ),
        max_leaves=6,
    )


def listed(a):
    found = [(p, tuple(s)) for p, s in enumerate_answers(a)]
    assert len({s for _, s in found}) == len(found)
    return {s: p for p, s in found}


# ---------------------------------------------------------------- the automaton


def derivations(node):
    "All (probability, words) of a grammar by plain recursion, equal texts not yet added up."
    if isinstance(node, str):
        return [(1.0, tuple(words_of(node)))]
    if isinstance(node, Choice):
        return [(p * q, w) for p, x in node.options for q, w in derivations(x)]
    out = [(1.0, ())]
    for part in node:
        out = [(p * q, w + v) for p, w in out for q, v in derivations(part)]
    return out


@settings(max_examples=150, deadline=None)
@given(grammars())
def test_automaton_gives_what_adding_up_all_derivations_gives(grammar):
    a, by_text = Answers(grammar), Counter()
    for p, words in derivations(grammar):
        by_text[(*words, END)] += p
    got = listed(a)
    assert got.keys() == by_text.keys()
    assert all(
        math.isclose(got[w], p, rel_tol=1e-9)
        and math.isclose(log_prob(a, w), math.log(p), abs_tol=1e-9)
        for w, p in by_text.items()
    )
    assert math.isclose(
        answer_entropy(a), -sum(p * math.log(p) for p in by_text.values()), abs_tol=1e-9
    )
    assert math.isclose(
        mean_length(a), sum(p * len(w) for w, p in by_text.items())
    ) and count_answers(a) == len(by_text)
    assert math.isclose(likeliest(a)[0], max(by_text.values()))
    assert math.isclose(sum(alive * h for alive, h in profile(a)), answer_entropy(a), abs_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(grammars(), st.integers(0, 9))
def test_next_word_is_the_conditional_probability(grammar, seed):
    a, whole = Answers(grammar), listed(Answers(grammar))
    answer = random.Random(seed).choice(list(whole))
    for t in range(len(answer)):
        matching = {w: p for w, p in whole.items() if w[:t] == answer[:t]}
        expected = Counter()
        for w, p in matching.items():
            expected[w[t]] += p / sum(matching.values())
        got = next_symbols(a, answer[:t])
        assert got.keys() == expected.keys() and all(
            math.isclose(got[s], expected[s], rel_tol=1e-9) for s in got
        )
    assert next_symbols(a, answer) == {} and next_symbols(a, ("z",)) == {}


def test_draws_follow_the_likelihood():
    prompt = next(r["prompt"] for r in ROWS["test"] if r["kind"] == "where")
    r, n = random.Random(1), 4000
    seen = Counter(sample_answer(prompt, r) for _ in range(n))
    expected = {text_of(s): p for p, s in enumerate_answers(answers(prompt))}
    assert set(seen) <= set(expected)
    chi = sum((seen[t] - n * p) ** 2 / (n * p) for t, p in expected.items())
    assert chi < len(expected) + 6 * math.sqrt(
        2 * len(expected)
    )  # mean + 6 standard deviations of chi-square


def test_a_value_that_is_fixed_stays_the_same():
    for row in (r for r in ROWS["train"] if r["kind"] == "bring" and "Without" in r["response"]):
        found = re.fullmatch(
            r"You will need (.+?)\. .* Without (.+?) you had better stay at home\.", row["response"]
        )
        assert found and found[1] == found[2], row


def test_an_unfinished_or_altered_answer_is_impossible_and_too_many_answers_are_not_listed():
    row = next(r for r in ROWS["test"] if r["kind"] == "plan")
    text = row["response"]
    assert log_likelihood(row["prompt"], text) > -60
    for wrong in (
        text[:-1],
        text + " Go!",
        text.replace(".", " .", 1),
        text.replace(" ", "  ", 1),
        "",
    ):
        assert log_likelihood(row["prompt"], wrong) == -math.inf
    with pytest.raises(UserError, match="end symbol"):
        log_prob(answers(row["prompt"]), words_of(text))
    with pytest.raises(UserError, match="more than 100"):
        list(enumerate_answers(answers(row["prompt"]), limit=100))


# ---------------------------------------------------------------- the committed files


def test_committed_files_come_from_the_generator():
    "A good part of each file: rows are drawn one after the other, so the first ones do not depend on how many follow."
    assert draw_villages() == villages()
    for split, n in (("train", 400), ("validation", 150), ("test", 150)):
        assert draw_split(split, n) == ROWS[split][:n]
    assert draw_corpus(1000) == load_corpus()[:1000] and len(load_corpus()) == world_module.CORPUS
    assert {split: len(rows) for split, rows in ROWS.items()} == world_module.SPLITS


def test_the_tokenizer_is_trained_on_the_committed_texts(tmp_path):
    again = world_module.build_world_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        world_module.data_dir() / "tokenizer" / "world" / "tokenizer.json"
    ).read_bytes()
    assert len(again) == world_module.VOCABULARY


def test_every_committed_answer_is_possible_and_labels_are_drawn_with_their_probability():
    surprise, expected, variance = 0.0, 0.0, 0.0
    for row in ROWS["test"][::2] + ROWS["train"][::8]:
        assert all(log_likelihood(row["prompt"], text) > -math.inf for text in row["references"])
        if "labels" in row:
            p = label_probabilities(row["prompt"])
            assert (
                list(p) == row["labels"]
                and row["response"] in p
                and math.isclose(sum(p.values()), 1)
            )
            h = entropy(row["prompt"])
            surprise, expected = surprise - math.log(p[row["response"]]), expected + h
            variance += sum(q * (math.log(q) + h) ** 2 for q in p.values())
    assert abs(surprise - expected) < 4 * math.sqrt(variance) and expected > 30


def test_ids_prompts_and_references():
    rows = [r for rs in ROWS.values() for r in rs]
    assert len({r["id"] for r in rows}) == len({r["prompt"] for r in rows}) == len(rows)
    assert all(
        split_of(read_prompt(r["prompt"])) == split for split, rs in ROWS.items() for r in rs
    )
    combined = {
        split: {p for r in rs if len((p := read_prompt(r["prompt"])).slots) > 1}
        for split, rs in ROWS.items()
    }
    assert combined["test"] and not combined["train"] & (
        combined["test"] | combined["validation"]
    )  # Prompt compares without its wording
    for r in ROWS["test"]:
        assert (
            r["references"][0] == r["response"]
            and len(set(r["references"])) == len(r["references"]) <= 8
        )
        assert "labels" in r or len(r["references"]) > 1, r
    assert sum(len(r["references"]) for r in ROWS["test"] if "labels" not in r) > 5 * sum(
        "labels" not in r for r in ROWS["test"]
    )


def test_prompts_are_not_near_duplicates():
    prompts = {split: [r["prompt"] for r in rs] for split, rs in ROWS.items()}
    assert (
        near_duplicate_share(prompts["test"], prompts["train"]) < 0.01
        and near_duplicate_share(prompts["validation"], prompts["train"]) < 0.01
    )
    assert near_duplicate_share(prompts["test"], prompts["validation"]) < 0.01


def test_every_fact_is_told_in_training():
    "All that a test answer may need has been said about that village, in a training row or in the corpus."
    told: dict[str, str] = {v: "" for v in villages()}
    texts = [r["prompt"] + " " + r["response"] for r in ROWS["train"]] + [
        r["text"] for r in load_corpus()
    ]
    for text in texts:
        for v in {w for w in words_of(text) if w in told}:
            told[v] += " | " + text
    for v, facts in villages().items():
        values = [
            facts[s] for s in ("mood", "feast", "name", "job", "near", "way", "month", "size")
        ]
        values += [x for slot in grammar_module.RANKED for p, x in facts[slot] if p >= 0.1]
        missing = [x for x in values if x not in told[v]]
        assert not missing, (v, missing)


def test_answers_of_every_length():
    words = [len(words_of(r["response"])) for r in ROWS["test"]]
    for low, high in ((1, 5), (6, 15), (16, 30), (31, 70)):
        assert sum(low <= n <= high for n in words) > 0.1 * len(words), (low, high)


def test_texts_are_english_sentences():
    for text in [
        t for rs in ROWS.values() for r in rs if "labels" not in r for t in r["references"]
    ] + [r["text"] for r in load_corpus()]:
        assert text_of(words_of(text)) == text and re.fullmatch(r"[A-Z].*[.!?]", text), text
        assert not re.search(r"\ba [aeio]|\ban [^aeiouh]|\{|\}|[.!?] [a-z]", text), text


def test_corpus_passages_are_those_of_their_grammar():
    for row in load_corpus()[:200]:
        a = Answers(world_module.passage_grammar(row["kind"], row["slots"]))
        assert log_prob(a, [*words_of(row["text"]), END]) > -math.inf, row


def test_a_row_can_be_drawn_for_any_prompt():
    prompt = read_prompt(ROWS["test"][0]["prompt"])
    row = draw_row(prompt, "x", 3, random.Random(0))
    assert (
        row["prompt"] == prompt.text
        and row["id"] == "x"
        and draw(world_module.prompt_grammar(prompt.text), random.Random(5))
    )


# ---------------------------------------------------------------- tokens


def test_tokens_and_words_agree():
    tok = load_world_tokenizer()
    for row in ROWS["test"][:60]:
        ids = answer_tokens(tok, row["response"])
        assert tok.decode(ids[:-1]) == row["response"] and ids[-1] == tok.eos_token_id
        a = token_answers(row["prompt"], tok)
        assert math.isclose(
            log_prob(a, ids), log_likelihood(row["prompt"], row["response"]), abs_tol=1e-9
        )
        assert math.isclose(answer_entropy(a), entropy(row["prompt"]), abs_tol=1e-9)


def test_the_tokenizer_spends_one_token_on_nearly_every_word():
    tok = load_world_tokenizer()
    texts = [t for r in ROWS["test"] for t in (r["prompt"], r["response"])]
    assert sum(len(tok.encode(t, add_special_tokens=False)) for t in texts) < 1.03 * sum(
        len(words_of(t)) for t in texts
    )


def test_generator_logprobs_stop_where_the_generator_would_never_go():
    tok = load_world_tokenizer()
    row = next(r for r in ROWS["test"] if r["kind"] == "bring")
    ids = answer_tokens(tok, row["response"])
    logprobs, inside = generator_logprobs(row["prompt"], ids, tok)
    assert logprobs.shape == (len(ids), len(tok)) and inside.all()
    assert torch.allclose(logprobs.exp().sum(1), torch.ones(len(ids), dtype=torch.float64))
    strange = [*ids[:4], tok.unk_token_id, *ids[4:]]
    again, inside = generator_logprobs(row["prompt"], strange, tok, size=len(tok) + 8)
    assert inside.tolist() == [True] * 5 + [False] * (len(strange) - 5)
    assert (
        torch.equal(again[:4, : len(tok)], logprobs[:4])
        and torch.isinf(again[5:]).all()
        and torch.isinf(again[:, len(tok) :]).all()
    )


def test_a_tokenizer_that_joins_words_is_refused():
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    joined = Tokenizer(models.BPE())
    joined.train_from_iterator(
        ["The people make rope."] * 50, trainers.BpeTrainer(vocab_size=60, show_progress=False)
    )
    with pytest.raises(UserError, match="not those of its words"):
        answer_tokens(
            PreTrainedTokenizerFast(tokenizer_object=joined, eos_token="</s>"),
            "The people make rope.",
        )
    assert word_tokens(load_world_tokenizer(), "rope") != word_tokens(load_world_tokenizer(), ".")


# ---------------------------------------------------------------- mistakes


def test_strangers_are_refused():
    with pytest.raises(UserError, match="not a prompt"):
        sample_answer("Where is Paris?", random.Random(0))
    for call in (load_world, draw_split):
        with pytest.raises(UserError, match="train, validation, test"):
            call("dev")


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(grammar_module.world_dir(), tmp_path / "world")
    for module in (grammar_module, world_module):
        monkeypatch.setattr(module, "world_dir", lambda: tmp_path / "world")
    assert len(load_world("validation")) == world_module.SPLITS["validation"]
    with open(tmp_path / "world" / "validation.jsonl", "a") as f:
        f.write("{}\n")
    with pytest.raises(UserError, match="checksum"):
        load_world("validation")
