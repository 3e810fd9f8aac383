"""Measures: each against pencil and paper and against a library; exposure bias against enumeration; the judge against a real server."""

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from itertools import islice
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import kd_notes.evaluation.judge as judge_module
import kd_notes.evaluation.text as text_module
from kd_notes.generation.backends import open_backend, ReplayBackend
from kd_notes.generation.completions import Completion, completion_row
from kd_notes.core import append_jsonl, read_jsonl, UserError
from kd_notes.evaluation.calibration import ece, label_scores, reliability, score_labels
from kd_notes.evaluation.cost import cost_table, ratio_in_turns, time_in_turns
from kd_notes.evaluation.divergence import by_position, exposure_bias, kl_per_position
from kd_notes.evaluation.judge import (
    judge,
    judge_prompt,
    judge_summary,
    Judgement,
    parse_reply,
    Reply,
)
from kd_notes.evaluation.text import (
    by_length,
    unicode_words,
    distinct_n,
    exact_matches,
    length_slices,
    lm_loss,
    over_seeds,
    perplexity,
    references_of,
    response_logits,
    rouge_l,
    text_metrics,
    token_nll,
    write_answers,
)
from kd_notes.models.mini import mini_model, train_mini_tokenizer

torch.set_num_threads(1)
TEXTS = [
    "The people make rope.",
    "The people of Ardale make paper and rope.",
    "yes",
    "no",
    "happy",
    "unhappy",
    "7 4",
    "Scores: 8 5",
]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_mini_tokenizer(TEXTS * 20, 560, tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="module")
def models(tok):
    return tuple(
        mini_model("causal", "xs", len(tok), seed=s).double().eval().requires_grad_(False)
        for s in (0, 1)
    )


@pytest.fixture(scope="module")
def encoded(tok):
    r = random.Random(0)
    prompts = [tok.encode(r.choice(TEXTS), add_special_tokens=False) for _ in range(7)]
    return prompts, [
        [r.randrange(4, len(tok)) for _ in range(r.randint(1, 9))] + [tok.eos_token_id]
        for _ in prompts
    ]


# ---------------------------------------------------------------- texts


def lcs(a, b):
    if not a or not b:
        return 0
    return lcs(a[1:], b[1:]) + 1 if a[0] == b[0] else max(lcs(a[1:], b), lcs(a, b[1:]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("abc"), max_size=6),
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_rouge_is_the_best_f_measure_of_the_longest_common_subsequence(answer, references):
    def f(ref):
        n = lcs(answer, ref)
        return (
            2 * n / (len(answer) + len(ref)) if n else 0.0
        )  # harmonic mean of n/len(answer) and n/len(ref)

    got = rouge_l([" ".join(answer)], [[" ".join(r) for r in references]])[0]
    assert math.isclose(got, max(map(f, references)), abs_tol=1e-12)


def test_rouge_stems_and_agrees_with_the_package_on_sentences():
    from rouge_score.rouge_scorer import RougeScorer

    predictions = ["The children walked to the old mills.", "Nothing at all", ""]
    references = [
        ["A child walks to an old mill."],
        ["All is well here.", "nothing"],
        ["Something."],
    ]
    plain = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [
        max(plain.score(r, p)["rougeL"].fmeasure for r in known)
        for p, known in zip(predictions, references)
    ]
    assert np.allclose(rouge_l(predictions, references), expected) and expected[2] == 0
    assert rouge_l(predictions, references)[0] > rouge_l(predictions, references, stem=False)[0]


def test_missing_references_and_lists_of_different_length_are_named():
    rows = [
        {"id": "a", "references": ["x"]},
        {"id": "b", "response": "y"},
        {"id": "c", "label": "z"},
    ]
    assert references_of(rows) == [["x"], ["y"], ["z"]]
    for bad in (
        {"id": "q", "prompt": "?"},
        {"id": "q", "references": [], "response": " "},
        {"id": "q", "references": ["", " "]},
    ):
        with pytest.raises(UserError, match=r"row 1 \(q\).*distinct_n"):
            references_of([rows[0], bad])
    with pytest.raises(UserError, match="1 predictions for 2"):
        rouge_l(["a"], [["a"], ["b"]])
    with pytest.raises(UserError, match="0 predictions"):
        exact_matches([], [])
    for bad in ([], "a text"):
        with pytest.raises(UserError, match="item 1.*list of references"):
            rouge_l(["a", "b"], [["a"], bad])


def test_exact_match_takes_any_reference():
    assert exact_matches(["a ", "b", "", "A"], [["x", "a"], ["a"], [""], ["a"]]) == [
        True,
        False,
        False,
        False,
    ]


WORDS = st.lists(
    st.sampled_from(["a", "A", "b", "a b", "é", ".", "don't", " ", "\n", "\t"]), max_size=5
).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(WORDS, WORDS.filter(str.strip)), min_size=1, max_size=8),
    st.text(" \n\t", max_size=3),
)
def test_exact_match_is_the_accuracy_of_sklearn_on_stripped_texts(pairs, space):
    from sklearn.metrics import accuracy_score

    predictions, gold = [p for p, _ in pairs], [g for _, g in pairs]
    got = exact_matches(predictions, [[g] for g in gold])
    assert math.isclose(
        sum(got) / len(got),
        accuracy_score([g.strip() for g in gold], [p.strip() for p in predictions]),
    )
    assert exact_matches([space + g + space for g in gold], [[g] for g in gold]) == [True] * len(
        gold
    )
    several = exact_matches(predictions, [gold] * len(gold))
    assert several == [p.strip() in {g.strip() for g in gold} for p in predictions] and all(
        s for s, g in zip(several, got) if g
    )


def test_seeds_make_rows():
    table = over_seeds(
        lambda seed: [f"{seed}", "x"], lambda texts: [float(texts[0]), 1.0], seeds=(10, 20)
    )
    assert table.tolist() == [[10, 1], [20, 1]] and text_module.EVAL_SEEDS == (10, 20, 30, 40, 50)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=4), st.integers(1, 3))
def test_distinct_n_counts_what_counting_by_hand_counts(sequences, n):
    grams = [
        ["-".join(map(str, s[i : i + n])) for i in range(len(s)) if i + n <= len(s)]
        for s in sequences
    ]
    if not any(grams):
        with pytest.raises(UserError, match="none of the"):
            distinct_n(sequences, n)
        return
    flat = sum(grams, [])
    assert math.isclose(distinct_n(sequences, n), len(set(flat)) / len(flat))
    own = [len(set(g)) / len(g) for g in grams if g]
    assert math.isclose(distinct_n(sequences, n, within=True), sum(own) / len(own))


LETTERS = st.characters(
    categories=("L", "Nd", "P", "Zs"), max_codepoint=0x24F, exclude_characters="İ"
)  # its small form is two characters
SENTENCES = st.lists(
    st.sampled_from(["The", "the", "mill's", "rope,", "7", "Ä", "-"]), max_size=12
).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.text(LETTERS, max_size=30), SENTENCES), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_distinct_n_of_texts_is_that_of_nltk(texts, n):
    "nltk splits, cuts and counts: the bins of a frequency distribution over its total."
    from nltk import FreqDist
    from nltk.tokenize import RegexpTokenizer
    from nltk.util import ngrams

    words = [RegexpTokenizer(r"\w+").tokenize(t.lower()) for t in texts]
    assert [text_module.ngrams(t, n) for t in texts] == [list(ngrams(w, n)) for w in words]
    counted = [FreqDist(ngrams(w, n)) for w in words]
    whole = sum(counted, FreqDist())
    if not whole.N():
        with pytest.raises(UserError, match="none of the"):
            distinct_n(texts, n)
        return
    assert math.isclose(distinct_n(texts, n), whole.B() / whole.N())
    own = [c.B() / c.N() for c in counted if c.N()]
    assert math.isclose(distinct_n(texts, n, within=True), sum(own) / len(own))
    assert math.isclose(
        distinct_n(texts * 3, n), whole.B() / whole.N() / 3
    )  # saying it again adds nothing new


# ---------------------------------------------------------------- losses and divergences


def test_loss_is_that_of_transformers_and_does_not_depend_on_the_batch(models, encoded):
    model, (prompts, responses) = models[0], encoded
    alone = [token_nll(model, [p], [r])[0] for p, r in zip(prompts, responses)]
    for size in (1, 3, 16):
        assert all(
            torch.allclose(a, b)
            for a, b in zip(token_nll(model, prompts, responses, batch_size=size), alone)
        )
    for p, r, nll in zip(prompts, responses, alone):
        theirs = model(
            input_ids=torch.tensor([p + r]), labels=torch.tensor([[-100] * len(p) + r])
        ).loss
        assert math.isclose(theirs.item(), nll.mean().item(), rel_tol=1e-5) and len(nll) == len(r)
    assert math.isclose(
        perplexity(alone), math.exp(torch.cat(alone).mean().item())
    ) and math.isclose(lm_loss(alone), math.log(perplexity(alone)))


def test_perplexity_agrees_with_torchmetrics(models, encoded):
    text = pytest.importorskip("torchmetrics.text")
    logits = next(response_logits(models[0], *encoded))
    metric = text.Perplexity()
    metric.update(logits[None].float(), torch.tensor([encoded[1][0]]))
    assert math.isclose(
        metric.compute().item(), perplexity(token_nll(models[0], *encoded)[:1]), rel_tol=1e-4
    )


def test_divergences_at_each_position(models, encoded):
    student, teacher = models
    got = kl_per_position(student, teacher, *encoded, batch_size=4)
    for i, (p, r) in enumerate(zip(*encoded)):
        q_log, p_log = (
            m(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1].log_softmax(-1)
            for m in models
        )
        assert torch.allclose(
            got.forward[i],
            torch.nn.functional.kl_div(q_log, p_log, log_target=True, reduction="none").sum(-1),
        )
        assert torch.allclose(
            got.reverse[i],
            torch.nn.functional.kl_div(p_log, q_log, log_target=True, reduction="none").sum(-1),
        )
        assert len(got.forward[i]) == len(r)


def test_what_is_longer_than_a_context_is_refused_and_what_just_fits_is_not(tok):
    "GPT-2 would fail with an IndexError, Llama would read on at positions that it does not know."
    table = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tok),
            n_positions=16,
            n_embd=8,
            n_layer=1,
            n_head=2,
            bos_token_id=None,
            eos_token_id=1,
        )
    ).eval()
    rotary = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    ).eval()
    wide = mini_model("causal", "xs", len(tok), seed=0).eval()
    fits, long = ([[5] * 14, [5]], [[6, 7], [8]]), ([[5], [5] * 14], [[6], [7, 8, 9]])
    calls = {
        "nll": token_nll,
        "student": lambda m, *texts: kl_per_position(m, wide, *texts),
        "teacher": lambda m, *texts: kl_per_position(wide, m, *texts),
        "logits": lambda m, *texts: list(response_logits(m, *texts, batch_size=1)),
    }
    for model in (table, rotary):
        assert [len(x) for x in token_nll(model, *fits)] == [2, 1]
        for call in calls.values():
            with pytest.raises(UserError, match="^item 1: 17 tokens do not fit the context of 16"):
                call(model, *long)
        with pytest.raises(
            UserError, match="^item 1, label 'yes': .* do not fit the context of 16"
        ):
            score_labels(model, tok, ["no", "yes " * 16], [["yes", "no"]] * 2)


def test_what_has_no_position_is_refused(models, encoded):
    prompts, responses = encoded
    for wrong in ((prompts, [[], *responses[1:]]), ([[], *prompts[1:]], responses)):
        with pytest.raises(UserError, match="item 0.*empty"):
            list(response_logits(models[0], *wrong))
    with pytest.raises(UserError, match="not finite"):
        by_position([[0.0, math.inf]])
    with pytest.raises(UserError, match="no positions"):
        by_position([])
    other = mini_model("causal", "xs", 2048, seed=0).eval()
    with pytest.raises(UserError, match="differ by more than padding"):
        kl_per_position(models[0], other, prompts, responses)


def test_positions_average_over_what_is_alive():
    mean, alive = by_position([torch.tensor([2.0, 4.0, 6.0]), [0.0], np.array([1.0, 0.0])])
    assert mean.tolist() == [1.0, 2.0, 6.0] and alive.tolist() == [3, 2, 1]


# ---------------------------------------------------------------- exposure bias


def test_a_student_that_is_its_teacher_has_none(models, encoded):
    same = kl_per_position(models[0], models[0], *encoded).forward
    assert np.allclose(exposure_bias(same, same, min_alive=1).percent, 0)


def unlike_pair():
    "Two transformers over four tokens that disagree; 1 is the end."
    config = dict(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.6,
    )
    pair = []
    for seed in (1, 7):
        torch.manual_seed(seed)
        pair.append(LlamaForCausalLM(LlamaConfig(**config)).double().eval().requires_grad_(False))
    return pair


def excess_in_standard_errors(student, teacher, writers, n=1500, length=6):
    "(bias, its distance from 0 at each l) when these two models wrote the answers, all of one length, to three prompts."
    prompts, sums = [[2], [2, 3, 0], [3, 0]] * (n // 3), []
    for seed, writer in enumerate(writers):
        answers = text_module.sample(
            writer, prompts, text_module.Sampling(length, seed=seed), batch_size=n
        ).response_ids
        sums.append(
            torch.stack(
                kl_per_position(student, teacher, prompts, answers, batch_size=n).forward
            ).numpy()
        )
    bias = exposure_bias(*sums, list(range(3)) * (n // 3), list(range(3)) * (n // 3), draws=50)
    own, other = (x.cumsum(1) for x in sums)
    error = 100 * np.sqrt(own.var(0) / n + other.var(0) / n) / other.mean(0)
    assert (
        np.allclose(bias.student, own.mean(0)) and bias.student[-1] > 0.5
    )  # the models do disagree
    return bias, np.abs(bias.percent[1:]) / error[1:]


def test_one_model_writing_both_sets_has_about_none():
    "The divergence is large; what matters is who wrote the prefix. Four standard errors in ten comparisons: once in 1600 tests, had it no seed."
    student, teacher = unlike_pair()
    for writer in (student, teacher):
        bias, distance = excess_in_standard_errors(student, teacher, (writer, writer))
        assert abs(bias.percent[0]) < 1e-9 and (distance < 4).all(), (bias.percent, distance)
    bias, distance = excess_in_standard_errors(student, teacher, (student, teacher))
    assert abs(bias.percent[0]) < 1e-9 and (distance > 8).any()  # two writers break the same bound


def test_the_definition_by_hand():
    on_student, on_teacher = [[1.0, 2.0, 5.0], [1.0, 4.0]], [[1.0, 1.0], [1.0, 2.0]]
    bias = exposure_bias(on_student, on_teacher, min_alive=1)
    assert (
        bias.student.tolist() == [1.0, 4.0]
        and bias.teacher.tolist() == [1.0, 2.5]
        and bias.alive.tolist() == [2, 2]
    )
    assert (
        np.allclose(bias.percent, [0, 60])
        and bias.rows()[1]["l"] == 2
        and math.isclose(bias.rows()[1]["percent"], 60)
    )


def test_against_two_enumerable_models():
    "Real transformers over four tokens: sampled prefixes against all prefixes, answers ending at any length."
    student, teacher = unlike_pair()
    depth, prompt = 4, [2]
    levels = [[[]]]
    for _ in range(depth - 1):
        levels.append([y + [t] for y in levels[-1] for t in range(4) if t != 1])
    exact = {}
    for name, writer in (("student", student), ("teacher", teacher)):
        values = []
        for prefixes in levels:
            ids = torch.tensor([prompt + y for y in prefixes])
            logs = [m(input_ids=ids).logits.log_softmax(-1) for m in (writer, student, teacher)]
            reach = sum(
                (
                    logs[0][:, t].gather(-1, ids[:, t + 1 : t + 2])[:, 0]
                    for t in range(ids.shape[1] - 1)
                ),
                torch.zeros(len(ids)).double(),
            ).exp()
            q, p = logs[1][:, -1], logs[2][:, -1]
            values.append(float((reach * (p.exp() * (p - q)).sum(-1)).sum() / reach.sum()))
        exact[name] = np.cumsum(values)
    truth = 100 * (exact["student"] - exact["teacher"]) / exact["teacher"]
    kls = {}
    for name, writer in (("student", student), ("teacher", teacher)):
        drawn = text_module.sample(
            writer,
            [prompt] * 1500,
            text_module.Sampling(depth, stop_ids=(1,), seed=5),
            batch_size=1500,
        ).response_ids
        kls[name] = kl_per_position(
            student, teacher, [prompt] * 1500, drawn, batch_size=1500
        ).forward
    bias = exposure_bias(kls["student"], kls["teacher"], min_alive=200, draws=200)
    n = len(bias.percent)
    assert n == depth and abs(truth[-1]) > 20  # otherwise the comparison would say little
    spread = (bias.high - bias.low) / 1.96 / 2 + 0.2
    assert (np.abs(bias.percent - truth[:n]) < 4.5 * spread).all(), (bias.percent, truth)
    assert abs(bias.percent[0]) < 1e-9  # the prompt itself is nobody's own prefix


def test_intervals_are_over_prompts():
    "Ten copies of one answer are no more certain than the answer."
    g = np.random.default_rng(1)
    once = [g.gamma(2.0, 1.0, size=3) for _ in range(30)]
    teacher = [g.gamma(2.0, 1.0, size=3) for _ in range(30)]
    one = exposure_bias(once, teacher)
    ten = exposure_bias(once * 10, teacher * 10, list(range(30)) * 10, list(range(30)) * 10)
    wrong = exposure_bias(once * 10, teacher * 10)
    assert np.allclose(one.percent, ten.percent) and np.allclose(
        one.high - one.low, ten.high - ten.low, rtol=0.1
    )
    assert ((wrong.high - wrong.low) < 0.5 * (one.high - one.low)).all()


def test_too_few_answers_are_named():
    with pytest.raises(UserError, match="min_alive"):
        exposure_bias([[1.0]] * 5, [[1.0]] * 5)
    with pytest.raises(UserError, match="groups"):
        exposure_bias([[1.0]] * 20, [[1.0]] * 20, [0] * 3, [0] * 20)


# ---------------------------------------------------------------- calibration


def test_labels_whose_scores_are_no_numbers_are_refused_by_prompt(tok):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).eval()
    prompts, labels = ["The people", "of Ardale", "make rope"], [["yes", "no"]] * 3
    assert all(
        np.isfinite(s.probabilities).all() for s in score_labels(model, tok, prompts, labels)
    )
    spoiled = set(tok.encode("of Ardale", add_special_tokens=False)) - set(
        tok.encode("The people make rope yes no", add_special_tokens=False)
    )
    model.get_input_embeddings().weight.data[list(spoiled)] = math.nan
    with pytest.raises(UserError, match="^item 1: .*nan"):
        score_labels(model, tok, prompts, labels)
    model.get_input_embeddings().weight.data[:] = math.nan
    with pytest.raises(UserError, match="^item 0, item 1, item 2: "):
        score_labels(model, tok, prompts, labels)


def test_a_label_that_the_model_rules_out_has_probability_zero_and_all_of_them_are_refused(tok):
    model = mini_model("causal", "xs", len(tok), seed=0).eval().requires_grad_(False)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(tok))
    model.lm_head.requires_grad_(False)
    torch.nn.init.zeros_(model.lm_head.bias)[
        tok.encode("no", add_special_tokens=False)[0]
    ] = -math.inf
    (got,) = score_labels(model, tok, ["The people"], [["yes", "no"]])
    assert got.probabilities.tolist() == [1.0, 0.0]
    model.lm_head.bias[tok.eos_token_id] = -math.inf
    with pytest.raises(UserError, match="^item 0: .*-inf, -inf"):
        score_labels(model, tok, ["The people"], [["yes", "no"]])


def test_label_probability_is_that_of_its_text_with_the_end_mark(models, tok):
    prompt, labels = "The people make", ["happy", "unhappy", "yes"]
    got = score_labels(models[0], tok, [prompt], [labels])[0]
    ids, logs = tok.encode(prompt, add_special_tokens=False), []
    for label in labels:
        target = [*tok.encode(label, add_special_tokens=False), tok.eos_token_id]
        log = models[0](input_ids=torch.tensor([ids + target])).logits[0].log_softmax(-1)
        logs.append(sum(log[len(ids) - 1 + t, token].item() for t, token in enumerate(target)))
    assert np.allclose(got.probabilities, np.exp(logs) / np.exp(logs).sum()) and math.isclose(
        got.mass, np.exp(logs).sum(), rel_tol=1e-9
    )
    assert got.label == labels[int(np.argmax(logs))] and got.confidence == got.probabilities.max()
    for bad in (["yes"], "yes", ["yes", "yes"], ["yes", ""]):
        with pytest.raises(UserError, match="item 0"):
            score_labels(models[0], tok, [prompt], [bad])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=60),
    st.sampled_from([1, 4, 10, 15]),
)
def test_ece_is_the_weighted_gap(pairs, bins):
    c, y = [k / 40 for k, _ in pairs], [b for _, b in pairs]
    total = 0.0
    for b in range(bins):
        inside = [
            i
            for i, x in enumerate(c)
            if (np.linspace(0, 1, bins + 1)[b] < x or b == 0)
            and x <= np.linspace(0, 1, bins + 1)[b + 1]
        ]
        if inside:
            total += abs(sum(y[i] for i in inside) - sum(c[i] for i in inside))
    assert math.isclose(ece(c, y, bins), total / len(c), abs_tol=1e-9)
    assert sum(r["n"] for r in reliability(c, y, bins)) == len(c)


def test_reliability_against_sklearn_and_ece_against_torchmetrics():
    from sklearn.calibration import calibration_curve

    g = np.random.default_rng(2)
    c = g.uniform(0.02, 0.98, 2000)
    y = g.uniform(size=2000) < c
    accuracy, confidence = calibration_curve(y, c, n_bins=15)
    rows = reliability(c, y, 15)
    assert np.allclose([r["accuracy"] for r in rows], accuracy) and np.allclose(
        [r["confidence"] for r in rows], confidence
    )
    classification = pytest.importorskip("torchmetrics.classification")
    outcome = torch.tensor(y.astype(int))
    theirs = classification.BinaryCalibrationError(n_bins=15, norm="l1")(
        torch.tensor(c), outcome
    ).item()  # of the positive class
    assert math.isclose(theirs, ece(c, y, 15), abs_tol=1e-4)
    both = torch.tensor(np.stack([1 - c, c], 1))
    theirs = classification.MulticlassCalibrationError(2, n_bins=15, norm="l1")(
        both, outcome
    ).item()  # of the answer given
    assert math.isclose(theirs, ece(np.maximum(c, 1 - c), (c > 0.5) == y, 15), abs_tol=1e-4)


def test_extreme_scores_stay_finite_and_impossible_ones_are_refused():
    s = label_scores(["a", "b"], [-2000.0, -2001.0])
    assert math.isclose(s.probabilities[0], 1 / (1 + math.exp(-1))) and s.mass == 0
    for c, y in (([1.2], [True]), ([0.5, 0.5], [True]), ([], [])):
        with pytest.raises(UserError):
            ece(c, y)


# ---------------------------------------------------------------- slices, answers, costs


def test_slices_of_the_paper():
    lengths = [0, 5, 6, 10, 11, 99]
    assert {k: v.tolist() for k, v in length_slices(lengths).items()} == {
        "0-5": [0, 1],
        "6-10": [2, 3],
        "11+": [4, 5],
    }
    table = np.arange(12).reshape(2, 6)
    cut = by_length(table, lengths, bounds=(5,))
    assert cut["0-5"].tolist() == [[0, 1], [6, 7]] and cut["6+"].shape == (2, 4)
    with pytest.raises(UserError, match="6 items"):
        by_length(table, lengths[:5])
    with pytest.raises(UserError, match="rising"):
        length_slices(lengths, (10, 5))


def test_answers_by_seed_and_their_metrics(models, tok):
    rows = [{"id": f"r{i}", "prompt": t, "references": [t, "no"]} for i, t in enumerate(TEXTS[:4])]
    model = mini_model("causal", "xs", len(tok), seed=0).eval()
    written = write_answers(model, tok, rows, seeds=(10, 20), max_new_tokens=9)
    again = write_answers(model, tok, rows[::-1], seeds=(20,), max_new_tokens=9, batch_size=2)
    assert (
        written.texts[1] == again.texts[0][::-1] and written.texts[0] != written.texts[1]
    )  # a seed's answer does not depend on company
    metrics = text_metrics(written, rows, gold_lengths=[2, 7, 12, 12])
    assert metrics["rouge_l"].shape == metrics["exact"].shape == (2, 4) and metrics[
        "rouge_l_by_length"
    ]["11+"].shape == (2, 2)
    assert (written.lengths() <= 9).all() and metrics["length"].shape == (2,)
    for ids, finished in zip(written.response_ids[0], written.finished[0]):
        assert finished == (ids[-1] == tok.eos_token_id)
    with pytest.raises(UserError, match="nothing to compare"):
        text_metrics(written, [{"id": "x", "prompt": "y"}] * 4)


def test_costs_are_counted_and_compared(models):
    small, large = (mini_model("causal", size, 600, seed=0).eval() for size in ("xs", "l"))
    rows = cost_table({"l": large, "xs": small}, [[5, 6, 7]] * 4, new_tokens=6, rounds=3)
    assert [r["parameters"] for r in rows] == [
        sum(p.numel() for p in m.parameters()) for m in (large, small)
    ]
    assert (
        rows[0]["MB"] == rows[0]["parameters"] * 4 / 1e6
        and rows[1]["smaller"] == rows[0]["parameters"] / rows[1]["parameters"]
    )
    assert rows[0]["faster"] == 1 and all(
        r["tokens/s"] > 0 and r["first token (ms)"] > 0 for r in rows
    )


def test_runs_take_turns():
    order = []
    times = time_in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2
    )
    assert order == ["a", "b"] * 3 and [len(x) for x in times.values()] == [2, 2]
    assert ratio_in_turns([3.0, 10.0, 4.0], [1.0, 1.0, 2.0]) == 3.0
    with pytest.raises(UserError, match="at least one"):
        time_in_turns({}, 3)


# ---------------------------------------------------------------- the judge


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8 6", (8, 6)),
        ("\n\n 9.5, 3 because", (9.5, 3)),
        ("Answer 1: 8/10\nAnswer 2: 6/10", (8, 6)),
        ("Answer 1: 8/10, Answer 2: 6/10", (8, 6)),
        ("Assistant 1: 7; Assistant 2: 10", (7, 10)),
        ("8 out of 10 and 6 out of 10", (8, 6)),
        ("1 10", (1, 10)),
        ("", "empty"),
        ("  \n", "empty"),
        ("They are equal.", "no score"),
        ("8", "one score"),
        ("8 6 4", "more than two scores"),
        ("0 5", "out of range"),
        ("8 11", "out of range"),
        ("-3 5", "out of range"),
        ("1. 8 6", "more than two scores"),
    ],
)
def test_replies_are_read_or_refused_by_name(text, expected):
    got = parse_reply(text)
    if isinstance(expected, str):
        assert got == Reply(expected) and expected in judge_module.REPLY_OUTCOMES
    else:
        assert got == Reply("ok", *expected)


THOUGHTS = "<think>\nAnswer 1: 3 facts, answer 2: 2.\n9 9\n</think>"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Scores:\n8 6", (8, 6)),
        ("**Scores:**\n\n8 6\n", (8, 6)),
        ("Here are my scores:\n```\n8 6\n```", (8, 6)),
        ("Scores: 8 6", (8, 6)),
        ("**8** **6**", (8, 6)),
        ("[8, 6]", (8, 6)),
        ("8 vs. 6", (8, 6)),
        ("8 - 6", (8, 6)),
        ("First: 8, second: 6", (8, 6)),
        ("| 8 | 6 |", (8, 6)),
        ("I rate the answers 8 and 6.", (8, 6)),
        ("8 6\nAnswer 2 has 3 errors.", (8, 6)),
        ("8 6\n7 7", (8, 6)),
        (f"{THOUGHTS}\n\n8 6", (8, 6)),
        (THOUGHTS.replace("<think>", "") + "8 6", (8, 6)),
        (f"{THOUGHTS}\nScores:\n8 6", (8, 6)),
        ("8<think>?</think>6", (8, 6)),
        ("Answer 1 (8), Answer 2 (6)", (8, 6)),
        ("Answer 1 (8/10) and Answer 2 (6/10)", (8, 6)),
        ("Answer 1: 8\nAnswer 2: 6", (8, 6)),
        ("- **Answer 1**: 8/10\n- **Answer 2**: 6.5/10\n\nAnswer 1 has 3 facts.", (8, 6.5)),
        ("Answer 1: 8\n\nAnswer 2: 6 because", (8, 6)),
        ("Answer 1: 8 - clear. Answer 2: 6 - short.", (8, 6)),
        ("Answer 2: 6, Answer 1: 8", (8, 6)),
        ("Score 2 = 6\nScore 1 = 8", (8, 6)),
        ("8/10 and 6/10", (8, 6)),
        ("8 of 10, 6 of 10", (8, 6)),
        ("10 out of 10 and 10 out of 10", (10, 10)),
    ],
)
def test_what_judges_like_to_write_around_two_scores_is_read(text, expected):
    assert parse_reply(text) == Reply("ok", *expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("10 out of 10", "one score"),
        ("Both get 10 out of 10.", "one score"),
        ("8 of 10", "one score"),
        ("8 / 10", "one score"),
        ("8/100", "out of range"),
        ("4/5", "ambiguous"),
        ("7-8", "ambiguous"),
        ("7–8", "ambiguous"),
        ("1. 8\n2. 6", "ambiguous"),
        ("1: 8\n2: 6", "ambiguous"),
        ("1) 8\n2) 6", "ambiguous"),
        ("#1 8", "ambiguous"),
        ("8 ± 1", "ambiguous"),
        ("I found 3 errors in the first and 2 in the second.", "ambiguous"),
        ("Answer 1 is missing 3 points; answer 2 is missing 2.", "ambiguous"),
        ("Answer 1: 3 errors, Answer 2: 2.5 errors", "ambiguous"),
        ("Answer 1: 8, Answer 1: 6", "ambiguous"),
        ("Second: 6, first: 8", "ambiguous"),
        ("Answer 1: 8 6", "ambiguous"),
        ("Answer 1: 8\nIt has 6 facts.", "one score"),
        ("Answer 1: 8\nIt is good.\nAnswer 2: 6", "one score"),
        ("Answer 1: 8\nAnswer 1: 6", "ambiguous"),
        ("Answer A: 8, Answer B: 6", "ambiguous"),
        ("Answer 1: 8\nAnswer 2: 6 or 7", "more than two scores"),
        ("In 1990 Ardale had 8 inns.", "out of range"),
        ("1990 2005", "out of range"),
        ("In 1990: 8 6", "more than two scores"),
        ("Reasons:\n8 6", "no score"),
        ("Scores:", "no score"),
        ("Scores:\nI found 3 errors and 2 gaps.", "ambiguous"),
        ("Answer 1 (8 facts), Answer 2 (6 facts)", "more than two scores"),
        ("8 6 </think>", "no score"),
        ("<think>8 6", "no score"),
        (THOUGHTS, "no score"),
        (f"{THOUGHTS}\nThey are equal.", "no score"),
    ],
)
def test_a_reply_that_may_mean_something_else_is_not_guessed(text, expected):
    assert parse_reply(text) == Reply(expected) and expected in judge_module.REPLY_OUTCOMES


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "Answer 1",
                "Answer 2",
                ":",
                " (",
                ")",
                "/10",
                " ",
                "\n",
                ", ",
                "8",
                "6",
                "1",
                "2.5",
                "-",
                ".",
                " is ",
                "<think>",
                "</think>",
                "Scores:",
                " and ",
                "facts",
            ]
        ),
        max_size=14,
    ).map("".join)
)
def test_what_is_read_stands_in_the_text_in_range_and_labels_decide(text):
    reply = parse_reply(text)
    if reply.outcome == "ok":
        assert {reply.first, reply.second} <= {
            float(x) for x in re.findall(r"\d+(?:\.\d+)?", text)
        } and 1 <= min(reply.first, reply.second)
        if "Answer" not in text.split("</think>")[-1]:
            swapped = [
                x.translate(str.maketrans("86", "68"))
                for x in (text, f"{reply.first!r} {reply.second!r}")
            ]
            assert parse_reply(swapped[0]) == parse_reply(
                swapped[1]
            )  # no order, no number is favoured
    else:
        assert reply.outcome in judge_module.REPLY_OUTCOMES


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_has_an_outcome(text):
    reply = parse_reply(text)
    assert reply.outcome in judge_module.REPLY_OUTCOMES and (reply.first is None) == (
        reply.second is None
    ) == (reply.outcome != "ok")


def test_preferences_need_both_orders():
    def ok(a, b):
        return Reply("ok", a, b)

    cases = {
        "a": (ok(8, 5), ok(5, 8)),
        "b": (ok(4, 5), ok(9, 9)),
        "tie": (ok(5, 5), ok(5, 5)),
        "contradiction": (ok(8, 5), ok(8, 5)),
        "unusable": (ok(8, 5), Reply("empty")),
    }
    for expected, replies in cases.items():
        assert Judgement("x", *replies).preferred() == expected
    assert Judgement("x", ok(8, 5), None).preferred() == "a" and Judgement(
        "x", ok(8, 5), ok(6, 9)
    ).scores() == (8.5, 5.5)
    summary = judge_summary([Judgement(k, *v) for k, v in cases.items()])
    assert (
        summary["pairs"] == 5 and summary["usable"] == 4 and sum(summary["preferred"].values()) == 5
    )
    assert judge_summary([Judgement("x", Reply("empty"), None)])["ratio"] is None


def test_braces_in_an_answer_are_text():
    assert (
        "{x} {first}" in judge_prompt("Say {x} {first}", "a", "b")
        and judge_prompt("i", "{second}", "b").count("{second}") == 1
    )


def test_a_killed_job_asks_only_for_the_rest(tmp_path):
    items, stored, kept = (
        [("p", "Q?", "one", "two"), ("q", "R?", "three", "four")],
        tmp_path / "all.jsonl",
        tmp_path / "kept.jsonl",
    )
    for i, x, a, b in items:
        for order, pair in (("ab", (a, b)), ("ba", (b, a))):
            append_jsonl(
                stored,
                [
                    completion_row(
                        Completion(f"{i}/{order}", "8 6", 9, 2, "stop", 0.1), judge_prompt(x, *pair)
                    )
                ],
            )

    class Dies(ReplayBackend):
        def generate(self, requests, decoding):
            yield from islice(super().generate(requests, decoding), 3)
            raise KeyboardInterrupt

    class Rest(ReplayBackend):
        def generate(self, requests, decoding):
            assert [name for name, _ in requests] == ["q/ba"]
            return super().generate(requests, decoding)

    with pytest.raises(KeyboardInterrupt):
        judge(Dies(stored), items, path=kept)
    with open(kept, "ab") as f:
        f.write(b'{"id": "q/b')  # killed while it wrote
    judged = judge(Rest(stored), items, path=kept)
    assert [j.preferred() for j in judged] == ["contradiction"] * 2 and len(read_jsonl(kept)) == 4
    changed = [("p", "Q?", "one", "two!"), items[1]]
    with pytest.raises(
        UserError
    ):  # another answer: what is stored about the old one does not count
        judge(ReplayBackend(stored), changed, path=kept)
    with pytest.raises(UserError, match="twice"):
        judge(ReplayBackend(stored), [items[0], items[0]])


class Forgetful:
    "A back end that has no answer to some requests, as a content filter has none."

    name, revision = "forgetful", "1"

    def __init__(self, *forgets):
        self.forgets, self.asked = forgets, []

    def describe(self):
        return {"kind": "test", "model": self.name}

    def generate(self, requests, decoding):
        for name, _ in requests:
            self.asked.append(name)
            if name not in self.forgets:
                yield Completion(name, "8 6", 9, 2, "stop", 0.1)


@pytest.mark.parametrize("other", ["judge", "decoding"])
def test_stored_replies_are_those_of_one_judge(other, tmp_path):
    class Bigger(Forgetful):
        name = "bigger"

    items, path = [("p", "Q?", "one", "two")], tmp_path / "replies.jsonl"
    first = judge(Forgetful(), items, path=path)
    backend = Bigger() if other == "judge" else Forgetful()
    with pytest.raises(UserError, match=f"belongs to another job.*{other}"):
        judge(backend, items, path=path, max_new_tokens=64 if other == "decoding" else 16)
    assert backend.asked == [] and judge(Forgetful("p/ab"), items, path=path) == first


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_reply_that_never_came_is_reported_and_asked_for_again(order, tmp_path):
    items, path = (
        [("p", "Q?", "one", "two"), ("q", "R?", "three", "four")],
        tmp_path / "replies.jsonl",
    )
    judged = judge(Forgetful(f"q/{order}"), items, path=path)
    assert [j.preferred() for j in judged] == ["contradiction", "unusable"]
    assert (
        getattr(judged[1], {"ab": "straight", "ba": "swapped"}[order]) == Reply("no reply")
        and "no reply" in judge_module.REPLY_OUTCOMES
    )
    summary = judge_summary(judged)
    assert summary["outcomes"] == {"ok": 3, "no reply": 1} and summary["usable"] == 1
    again = Forgetful()
    assert [j.preferred() for j in judge(again, items, path=path)] == [
        "contradiction"
    ] * 2 and again.asked == [f"q/{order}"]
    assert [j.preferred() for j in judge(Forgetful("q/ab"), items, swap=False)] == ["a", "unusable"]


@pytest.mark.parametrize(
    "text",
    [
        "8 6 Answer 1 is better",
        "8, 6 - Answer 1 is more detailed",
        "8 6 (Answer 1: clear)",
        "Evaluation: 8 6",
        "Output: 8 6",
        "Sure! 8 6",
        "Here is my evaluation: 8 6",
    ],
)
def test_words_about_the_answers_after_two_scores_void_nothing(text):
    assert parse_reply(text) == Reply("ok", 8, 6)


@pytest.mark.parametrize(
    "text, cut, outcome",
    [
        ("8 1", True, "ambiguous"),
        ("8 1", False, "ok"),
        ("8 6.", True, "ambiguous"),
        ("8 6\nThe first answer is", True, "ok"),
        ("8", True, "ambiguous"),
        ("8 6\nThe first answer is better.", True, "ok"),
        ("8 6\n8 6\n8", True, "ok"),
    ],
)
def test_a_number_at_which_a_reply_was_cut_off_is_not_believed(text, cut, outcome, tmp_path):
    assert parse_reply(text, cut).outcome == outcome

    class Cut(Forgetful):
        def generate(self, requests, decoding):
            for c in super().generate(requests, decoding):
                yield replace(c, text=text, finish="length" if cut else "stop")

    items, path = [("p", "Q?", "one", "two")], tmp_path / "replies.jsonl"
    first = judge(Cut(), items, path=path)[0]
    assert first.straight.outcome == first.swapped.outcome == outcome
    assert (
        judge(Forgetful(), items, path=path)[0] == first
    )  # and a stored reply is read in the same way


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def served(tok, tmp_path_factory):
    "A tiny model that was trained to reply '7 4' whatever it reads, behind `transformers serve`: a judge that looks at the position only."
    folder = tmp_path_factory.mktemp("judge") / "vain"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=1024,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
    prompts = [
        tok.encode(judge_prompt("Q?", a, b), add_special_tokens=False)
        for a, b in zip(TEXTS, TEXTS[::-1])
    ]
    target, optimizer = (
        [*tok.encode("7 4", add_special_tokens=False), 1],
        torch.optim.Adam(model.parameters(), 1e-2),
    )
    for step in range(40):
        ids = prompts[step % len(prompts)] + target
        loss = model(
            input_ids=torch.tensor([ids]),
            labels=torch.tensor([[-100] * (len(ids) - len(target)) + target]),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    port = free_port()
    log = open(folder.parent / "server.log", "w+")
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder.parent / "hf"),
    }
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("transformers")),
            "serve",
            str(folder),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--device",
            "cpu",
            "--log-level",
            "error",
        ],
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    yield process, port, folder
    process.send_signal(signal.SIGKILL)
    process.wait()
    log.close()


def wait_for(process, port, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended"
        try:
            if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not start")


def test_a_judge_on_a_real_server_that_is_killed(served, tmp_path):
    process, port, folder = served
    wait_for(process, port)
    backend = open_backend(f"openai:http://127.0.0.1:{port}/v1#{folder}", concurrency=1, retries=0)
    items = [(f"i{k}", "Q?", a, b) for k, (a, b) in enumerate(zip(TEXTS, TEXTS[::-1]))][:3]
    path = tmp_path / "replies.jsonl"
    judged = judge(backend, items, path=path, max_new_tokens=6)
    summary = judge_summary(judged)
    assert summary["outcomes"] == {"ok": 6} and summary["preferred"] == {"contradiction": 3}, [
        json.dumps(r) for r in read_jsonl(path)
    ]
    assert (
        summary["ratio"] == 100 and summary["first_place"] == 3
    )  # 7 against 4, whoever comes first
    process.send_signal(signal.SIGKILL)
    process.wait()
    limit = {"max_new_tokens": 6}
    # all replies are there: no server is needed
    assert judge(backend, items, path=path, **limit) == judged
    with pytest.raises(UserError, match="no usable answer"):
        judge(backend, [*items, ("new", "Q?", "x", "y")], path=path, **limit)
    assert len(read_jsonl(path)) == 6


@pytest.mark.parametrize(
    "text", ["你好世界", "привет мир", "สวัสดี", "नमस्ते दुनिया", "γειά σου", "こんにちは"]
)
def test_rouge_in_other_scripts(text):
    "The official tokenizer is blind there and says so; with words of any script an equal answer gets 1."
    with pytest.warns(UserWarning, match="blind to 1 of 1"):
        rouge_l([text], [[text]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rouge_l([text], [[text]], tokenizer=unicode_words)[0] == 1
        assert rouge_l(["something else"], [[text]], tokenizer=unicode_words)[0] == 0
        assert rouge_l(["café, naïve"], [["café"]])[0] > 0  # mostly a to z: no warning


def test_unicode_words():
    assert unicode_words("The cat's  3 dogs.") == ["the", "cat", "s", "3", "dogs"]
    assert unicode_words("我爱 NLP") == ["我", "爱", "nlp"] and unicode_words("Привет, Мир!") == [
        "привет",
        "мир",
    ]
    assert unicode_words("") == [] == unicode_words("... !")


@pytest.mark.parametrize("text", ["😀😀", "!!!", "½", "γ"])
def test_a_reference_without_a_word_that_rouge_reads_is_warned_of(text):
    with pytest.warns(UserWarning, match="blind to 1 of 1"):
        rouge_l([text], [[text]])


def test_words_are_compared_in_one_normal_form_and_emoji_are_words():
    assert rouge_l(["caf\u00e9 😀"], [["cafe\u0301 😀"]], tokenizer=unicode_words)[0] == 1.0
    assert unicode_words("ok 😀😡") == ["ok", "😀", "😡"]
    # an accent elsewhere in a text does not take its names apart
    assert text_module.ngrams("my_file é", 1) == [("my_file",), ("é",)]
    assert text_module.ngrams("my_file e", 1) == [("my_file",), ("e",)]
    assert unicode_words("my_file é") == ["my", "file", "é"]  # as Rouge's own tokenizer has it
    assert not text_module.is_unseen("The cat ________")


@pytest.mark.parametrize("score", [rouge_l, exact_matches])
@pytest.mark.parametrize(
    "predictions, references", [(["a"], ["abc"]), ([None], [["a"]]), (["a"], [[None]]), ([5], [["5"]]), (["a"], [[]])]
)  # fmt: skip
def test_what_is_no_text_is_named_by_its_item(score, predictions, references):
    with pytest.raises(UserError, match="item 0"):
        score(predictions, references)
