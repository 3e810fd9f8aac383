"""White-box distillation: rows, word-level KD, SeqKD, other tokenizers, `distill` with real kills. Small random models, real processes."""

import copy
import json
import math
import os
import shutil
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kd_notes.methods.seqkd as seqkd_module
import kd_notes.products.distill as distill_module
import kd_notes.products.request as request_module
from helpers import start_script
from kd_notes.core import read_json, UserError
from kd_notes.checksums import verify_checksums
from kd_notes.data.examples import load_split
from kd_notes.losses.divergences import DIVERGENCES, forward_kl
from kd_notes.data.answers import pack_numbers
from kd_notes.methods.logit_cache import write_cache
from kd_notes.models.mini import load_mini_tokenizer, mini_model, train_mini_tokenizer
from kd_notes.training.batches import causal_batch, target_logits
from kd_notes.training.checkpoint import save_model
from kd_notes.training.loop import train
from kd_notes.training.state import TrainConfig
from kd_notes.data.dialogues import (
    encode_row,
    load_prompts,
    PLAIN_TEMPLATE,
    prompt_ids,
    PROMPT_SPLITS,
    prompt_texts,
)
from kd_notes.data.rows import load_rows, read_row, TextRow
from kd_notes.products.distill import distill
from kd_notes.products.request import expected_memory, Request, TeacherGroup
from kd_notes.products.settings import (
    distill_settings,
    held_out_places,
    hold_out,
    learnt_too,
    OBJECTIVES,
    prompt_groups,
)
from kd_notes.evaluation.validation import Validation
from kd_notes.experiments.equal_time import (
    EqualTime,
    item_table,
    pair,
    PAIR_ARMS,
    pair_rows,
    PairCosts,
    PairReferences,
    steps_for,
)
from kd_notes.experiments.instruction_sets import (
    dolly_dialogues,
    hub_dialogues,
    hub_rows,
    load_set,
    split_rows,
)
from kd_notes.methods.logit_kd import KD, OtherTokenizer
from kd_notes.methods.seqkd import answered_rows, write_responses, Writing
from kd_notes.models.layer_drop import make_student
from kd_notes.models.pretrained import context_of, load_pretrained, load_teacher

TOK = load_mini_tokenizer()
V = len(TOK)


def dialogues(n: int, split: str = "pool") -> list[TextRow]:
    return [TextRow(e.id, e.input, e.rationale).as_chat() for e in load_split("nli", split)[:n]]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [encode_row(d, TOK) for d in dialogues(12)]


@pytest.fixture(scope="module")
def teacher():
    model = mini_model("causal", "s", V, seed=0)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)  # distributions that are not almost flat
    return model


@pytest.fixture(scope="module")
def student():
    return mini_model("causal", "xs", V, seed=1)


def batch_of(rows, pad=0):
    return causal_batch([(r["prompt"], r["completion"]) for r in rows], pad)


# --- rows ---------------------------------------------------------------------------------------------------------------------------

BAD = [
    ('{"prompt": "a"}', "'response' is missing"),
    ('{"prompt": "a", "response": "  "}', "'response' is empty"),
    ('{"prompt": "", "response": "b"}', "'prompt' is empty"),
    ('{"prompt": 3, "response": "b"}', "is not text (3)"),
    ('{"question": "a", "answer": "b"}', "fields question, answer"),
    ('{"instruction": "a", "input": "x"}', "'output' is missing"),
    ('{"messages": "hi"}', "list of at least two"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "list of at least two"),
    (
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
        "last two should be user and assistant",
    ),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
        "'content' is empty",
    ),
    (
        '{"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "roles are",
    ),
    ("[1, 2]", "not one JSON object"),
    ('{"prompt": "a", ', "not one JSON object"),
]


@pytest.mark.parametrize("line,message", BAD, ids=range(len(BAD)))
def test_a_malformed_row_is_named_with_its_line(tmp_path, line, message):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "fine", "response": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError, match="mine.jsonl:3") as e:
        load_rows(file, chat=True)
    assert message in str(e.value)


def test_three_shapes_are_one(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '{"prompt": "a\\n\\nb", "completion": "c"}\n{"instruction": "a", "input": "b", "output": "c"}\n'
        '{"messages": [{"role": "user", "content": "a\\n\\nb"}, {"role": "assistant", "content": "c"}]}\n'
    )
    found = load_rows(file, chat=True)
    assert len({(d.prompt[0]["content"], d.completion) for d in found}) == 1 and [
        d.id for d in found
    ] == ["mine-0", "mine-1", "mine-2"]
    assert len(load_rows(file, n=2, chat=True)) == 2


def test_ids_must_differ(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"id": 1, "prompt": "a", "response": "b"}\n{"id": 1, "prompt": "c", "response": "d"}\n'
    )
    with pytest.raises(UserError, match="an id occurs twice"):
        load_rows(tmp_path / "a.jsonl", chat=True)


def test_a_chat_reads_the_earlier_turns_and_learns_the_last_answer():
    said = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("assistant", "See you."),
    ]
    d = read_row({"messages": [{"role": r, "content": c} for r, c in said]}, "a")
    row = encode_row(d, TOK)
    read = TOK.decode(row["prompt"])
    assert all(text in read for text in ("Be brief.", "Hello.", "Bye")) and "See you" not in read
    assert TOK.decode(row["completion"], skip_special_tokens=True).strip() == "See you."


def test_a_system_message_is_put_in_front_only_where_there_is_none():
    one = read_row({"prompt": "Hi", "response": "x"}, "a", chat=True)
    chat = [
        {"role": r, "content": c}
        for r, c in (("system", "Mine."), ("user", "Hi"), ("assistant", "x"))
    ]
    said = [
        TOK.decode(prompt_ids(row.prompt, TOK, system="Yours."))
        for row in (one, read_row({"messages": chat}, "b"))
    ]
    assert "Yours." in said[0] and "Yours." not in said[1] and "Mine." in said[1]


def test_a_template_that_refuses_a_role_is_explained():
    tok = load_mini_tokenizer()
    tok.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(
        UserError,
        match="mine.jsonl:7: the model's chat template refuses these messages: System role not supported",
    ):
        row = read_row({"prompt": "a", "response": "b"}, "a", "mine.jsonl:7", chat=True)
        encode_row(row, tok)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60))
def test_encoding_never_exceeds_the_context_and_ends_only_what_is_whole(limit):
    words = {"prompt": "Name a bird.", "response": "A duck is a bird, and so is an owl."}
    d = read_row(words, "a", "f:1", chat=True)
    full = encode_row(d, TOK)
    if limit and limit <= len(full["prompt"]):
        with pytest.raises(UserError, match="f:1: the prompt has"):
            encode_row(d, TOK, max_length=limit)
        return
    row = encode_row(d, TOK, max_length=limit)
    assert not limit or len(row["prompt"]) + len(row["completion"]) <= limit
    assert row["completion"] == full["completion"][: len(row["completion"])] and row["whole"] == (
        row["completion"][-1] == TOK.eos_token_id
    )


# --- sets of the hub ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_set(tmp_path, monkeypatch):
    "A local folder in the hub's layout, with Dolly's fields; every prompt occurs twice."
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    lines = [
        {
            "instruction": f"Count to {i % 40}.",
            "context": "In words." * (i % 2),
            "response": "One.",
            "category": "qa",
        }
        for i in range(80)
    ]
    (tmp_path / "set" / "train.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in [*lines, *lines])
    )
    return f"hub:{tmp_path / 'set'}"


def test_a_set_of_the_hub_is_split_and_no_prompt_is_in_two_parts(hub_set):
    found = {s: hub_dialogues(hub_set, s) for s in ("train", "validation", "test")}
    assert [len(p) for p in found.values()] == [32, 4, 4] and found == {
        s: hub_dialogues(hub_set, s) for s in found
    }
    texts = [d.prompt[0]["content"] for p in found.values() for d in p]
    assert sorted(texts) == sorted(f"Count to {i}." + "\n\nIn words." * (i % 2) for i in range(40))
    assert all(
        d.completion == "One." and d.where.startswith(f"{hub_set}, row ")
        for p in found.values()
        for d in p
    )


def test_a_set_of_the_hub_may_have_no_part_to_train_on(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text(
        "".join(json.dumps({"instruction": f"Say {i}.", "output": "One."}) + "\n" for i in range(3))
    )
    assert [r["instruction"] for r in hub_rows(f"hub:{tmp_path / 'set'}:test")] == [
        "Say 0.",
        "Say 1.",
        "Say 2.",
    ]
    with pytest.raises(UserError, match="hub:<id>:<part>"):
        hub_rows(f"hub:{tmp_path / 'set'}")


def test_both_lessons_split_a_set_alike(hub_set):
    for split in ("train", "validation", "test"):
        assert [a.id for a in load_set(hub_set, split)] == [
            d.id for d in hub_dialogues(hub_set, split)
        ]


def test_hub_splits_have_the_papers_sizes_when_there_are_enough_rows():
    many = [TextRow(str(i), str(i), "x").as_chat() for i in range(15000)]
    assert [len(split_rows(many, s, "d")) for s in ("test", "validation", "train")] == [
        500,
        1000,
        13500,
    ]


def test_rows_of_a_pair_come_from_the_hub(hub_set):
    assert len(pair_rows(pair(data=hub_set, n=0, held_out=0, system=None), "train", TOK)) == 32
    with pytest.raises(UserError, match="could not be loaded"):
        hub_dialogues("hub:/nowhere/at/all", "train")


# --- KD -----------------------------------------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_the_full_logits_at_the_response(rows, teacher, student):
    batch, sums = batch_of(rows[:5]), 0.0
    with torch.no_grad():
        s, t = student(batch["input_ids"]).logits, teacher(batch["input_ids"]).logits
        for b, r in enumerate(rows[:5]):
            span = slice(len(r["prompt"]) - 1, len(r["prompt"]) - 1 + len(r["completion"]))
            sums += forward_kl(s[b, span], t[b, span], denominator=1)
        found = KD(TOK, teacher).loss_sums(student, batch)["kd"]
    torch.testing.assert_close(found, sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"uld"}))
def test_every_divergence_of_the_registry_trains(name, rows, teacher):
    model = mini_model("causal", "xs", V, seed=2)
    result = train(
        model,
        KD(TOK, teacher, name, sft_weight=0.3),
        rows,
        TrainConfig(max_steps=1, batch_size=4, lr=1e-3, device="cpu"),
    )
    first = result.history[0]
    assert math.isfinite(first["loss"]) and first["grad_norm"] > 0
    assert first["loss"] == pytest.approx(0.7 * first["kd"] + 0.3 * first["sft"], rel=1e-5)


def test_temperature_scales_logits_and_t2_the_loss(rows, teacher, student):
    batch = batch_of(rows[:3])
    with torch.no_grad():
        plain, scaled = (
            KD(TOK, teacher, temperature=2.0, scale_t2=t2).loss_sums(student, batch)["kd"]
            for t2 in (False, True)
        )
        one = KD(TOK, teacher).loss_sums(student, batch)["kd"]
    assert scaled == pytest.approx(4 * plain.item(), rel=1e-6) and plain != one


def test_the_teacher_is_frozen_in_eval_mode_and_never_moves(rows):
    noisy = mini_model("causal", "xs", V, seed=5, dropout=0.5).train()
    before = {k: v.clone() for k, v in noisy.state_dict().items()}
    cfg = TrainConfig(max_steps=2, batch_size=4, lr=1e-3, log_every=1, device="cpu")
    first, again = (
        train(mini_model("causal", "xs", V, seed=2), KD(TOK, noisy), rows, cfg).history
        for _ in range(2)
    )
    assert [r["loss"] for r in first] == [r["loss"] for r in again]
    with torch.no_grad():
        noisy.train()
        a, b = (target_logits(noisy, batch_of(rows)) for _ in range(2))
        assert not torch.equal(a, b)  # in training mode it would have shown
    KD(TOK, noisy)
    assert not noisy.training and all(
        not p.requires_grad and p.grad is None for p in noisy.parameters()
    )
    assert all(torch.equal(v, before[k]) for k, v in noisy.state_dict().items())


def test_accumulation_gives_the_same_training(rows, teacher):
    found = []
    for size, parts in ((4, 1), (2, 2)):
        model = mini_model("causal", "xs", V, seed=2)
        cfg = TrainConfig(
            max_steps=3,
            batch_size=size,
            gradient_accumulation_steps=parts,
            lr=1e-3,
            log_every=1,
            device="cpu",
        )
        found.append(
            [
                r["loss"]
                for r in train(model, KD(TOK, teacher, "jsd", sft_weight=0.5), rows, cfg).history
            ]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_padding_and_prompt_logits_do_not_matter(rows, teacher, student):
    method = KD(TOK, teacher, sft_weight=0.5)
    with torch.no_grad():
        alone = [method.loss_sums(student, batch_of([r])) for r in rows[:3]]
        together = method.loss_sums(student, batch_of(rows[:3], pad=7))
    for term in ("kd", "sft"):
        assert together[term].item() == pytest.approx(sum(a[term].item() for a in alone), rel=1e-5)


def test_a_wider_padded_vocabulary_is_sliced_and_two_tokenizers_are_not(rows, teacher, student):
    import copy

    wide = copy.deepcopy(teacher)
    wide.resize_token_embeddings(V + 50)
    with torch.no_grad():
        wide.get_input_embeddings().weight[V:] = -30  # what such rows say must not count
        narrow, sliced = (
            KD(TOK, t).loss_sums(student, batch_of(rows[:3]))["kd"].item() for t in (teacher, wide)
        )
    assert sliced == pytest.approx(narrow, rel=1e-4)
    with pytest.raises(UserError, match="differ by more than padding"):
        KD(TOK, mini_model("causal", "xs", 2 * V, seed=0)).loss_sums(student, batch_of(rows[:1]))


def test_padding_of_equal_width_is_cut_on_both_sides_fused_or_not(rows, teacher, student):
    "Two checkpoints of one family are often padded to the same width; the rows beyond the tokenizer were never trained."
    import copy

    pair = [copy.deepcopy(m) for m in (student, teacher)]
    for model in pair:
        model.resize_token_embeddings(V + 40)
        with torch.no_grad():
            model.get_input_embeddings().weight[V:] = 0.5
    with torch.no_grad():
        want = KD(TOK, teacher).loss_sums(student, batch_of(rows[:3]))["kd"].item()
        made = [
            KD(TOK, pair[1], fused=fused, vocabulary=V)
            .loss_sums(pair[0], batch_of(rows[:3]))["kd"]
            .item()
            for fused in (True, False)
        ]
        said = Validation(rows[:3], TOK.pad_token_id, pair[1], vocabulary=V)(pair[0])["forward_kl"]
    assert made == pytest.approx([want, want], rel=1e-4)
    assert said == pytest.approx(
        Validation(rows[:3], TOK.pad_token_id, teacher)(student)["forward_kl"], rel=1e-4
    )


def test_kd_works_for_encoder_decoders():
    from kd_notes.data.examples import Example

    rows = [Example(str(i), "nli", f"say {i}", f"number {i}") for i in range(4)]
    method = KD(TOK, mini_model("t5", "xs", V, seed=1), sft_weight=0.5, family="t5")
    result = train(
        mini_model("t5", "xs", V, seed=0),
        method,
        rows,
        TrainConfig(max_steps=2, batch_size=2, lr=1e-3, device="cpu"),
    )
    assert math.isfinite(result.history[-1]["loss"])


@pytest.mark.parametrize(
    "wrong", [{"sft_weight": 1.0}, {"sft_weight": -0.1}, {"divergence": "kl"}, {"alpha": 0.1}]
)
def test_wrong_arguments_are_refused(teacher, wrong):
    with pytest.raises(UserError):
        KD(TOK, teacher, **wrong)


# --- validation ---------------------------------------------------------------------------------------------------------------------


def test_validation_agrees_with_the_losses_row_by_row(rows, teacher, student, tmp_path):
    check = Validation(rows, 0, teacher, batch_size=5, states_file=tmp_path / "s.safetensors")
    items = check.items(student)
    for i in (0, 3, 11):
        with torch.no_grad():
            sums = KD(TOK, teacher, sft_weight=0.5).loss_sums(student, batch_of([rows[i]]))
        assert items["forward_kl"][i] == pytest.approx(sums["kd"].item(), rel=1e-4)
        assert items["nll"][i] == pytest.approx(sums["sft"].item(), rel=1e-4)
    again = Validation(
        rows, 0, teacher, batch_size=5, states_file=tmp_path / "s.safetensors"
    )  # from the file
    assert np.array_equal(items["reverse_kl"], again.items(student)["reverse_kl"])
    assert check(student)["perplexity"] == pytest.approx(
        math.exp(items["nll"].sum() / items["tokens"].sum())
    )


def test_damaged_states_of_a_teacher_are_one_clear_error(rows, teacher, tmp_path):
    file = tmp_path / "s.safetensors"
    file.write_bytes(b"cut off")
    with pytest.raises(UserError, match="the teacher's states cannot be read.*Delete the file"):
        Validation(rows, 0, teacher, states_file=file)


def test_validation_without_kept_states_is_the_same(rows, student):
    model = mini_model("causal", "xs", V, seed=3)
    kept = Validation(rows, 0, model)(student)
    model.config.final_logit_softcapping = (
        None  # as for a model whose logits are more than a product: no states are kept
    )
    model.config.logit_scale = 1.0000001
    again = Validation(rows, 0, model)
    assert again.states is None and again(student)["forward_kl"] == pytest.approx(
        kept["forward_kl"], rel=1e-5
    )


def test_validation_leaves_the_mode_of_the_model_alone(rows, student):
    student.train()
    Validation(rows[:2], 0)(student)
    assert student.training


# --- SeqKD --------------------------------------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_how_they_are_batched(tmp_path, teacher):
    asked, w = dialogues(6, "validation"), Writing(max_new_tokens=8)
    a = write_responses(tmp_path / "a.jsonl", teacher, TOK, asked, w, chunk=2)
    b = write_responses(tmp_path / "b.jsonl", teacher, TOK, asked, w, chunk=5)
    assert [d.completion for d in a] == [d.completion for d in b] and all(
        d.prompt == q.prompt for d, q in zip(a, asked)
    )


def test_answers_of_another_job_are_refused(tmp_path, teacher):
    asked = dialogues(2, "validation")
    write_responses(tmp_path / "a.jsonl", teacher, TOK, asked, Writing(max_new_tokens=4))
    for more in ({"name": "other"}, {"writing": Writing(max_new_tokens=4, seed=1)}):
        with pytest.raises(UserError, match="belongs to another job"):
            write_responses(
                tmp_path / "a.jsonl",
                teacher,
                TOK,
                asked,
                **({"writing": Writing(max_new_tokens=4)} | more),
            )


def test_the_beam_finds_answers_at_least_as_likely_as_greedy(tmp_path, teacher):
    asked, mean = dialogues(4, "validation"), {}
    for how in ("greedy", "beam"):
        said = write_responses(
            tmp_path / f"{how}.jsonl", teacher, TOK, asked, Writing(how, max_new_tokens=4, width=5)
        )
        rows = [encode_row(d, TOK) for d in said]
        items = Validation(rows, 0).items(teacher)
        mean[how] = items["nll"].sum() / items["tokens"].sum()
    assert mean["beam"] <= mean["greedy"] + 1e-6
    assert json.loads((tmp_path / "beam.manifest.json").read_text())["writing"]["width"] == 5


def test_an_answer_that_was_cut_has_no_end_to_learn(tmp_path, teacher):
    said = write_responses(
        tmp_path / "a.jsonl", teacher, TOK, dialogues(4, "validation"), Writing(max_new_tokens=3)
    )
    cut = [d for d in said if not d.whole]
    assert cut and all(encode_row(d, TOK)["completion"][-1] != TOK.eos_token_id for d in cut)


# --- other tokenizers ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return train_mini_tokenizer(
        [d.prompt[0]["content"] for d in dialogues(60)], 560, tmp_path_factory.mktemp("other")
    )


@pytest.mark.parametrize("how", ["uld", "spans_likelihood", "spans_uld", "spans_matched"])
def test_a_student_learns_across_tokenizers(how, other, teacher):
    method = KD(other, OtherTokenizer(teacher, TOK), how)
    rows = [method.encode(d) for d in dialogues(8)]
    cfg = TrainConfig(max_steps=12, batch_size=8, lr=3e-3, log_every=1, device="cpu")
    result = train(mini_model("causal", "xs", len(other), seed=0), method, rows, cfg)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.tokens == 12 * sum(
        len(r["prompt"]) + len(r["completion"]) for r in rows
    )  # the student's


def test_with_one_tokenizer_matched_spans_are_the_forward_kl(rows, teacher, student):
    method = KD(TOK, OtherTokenizer(teacher, TOK), "spans_matched", sft_weight=0.5)
    batch = method.collate([method.encode(d) for d in dialogues(4)])
    with torch.no_grad():
        found, wanted = (
            method.loss_sums(student, batch),
            KD(TOK, teacher, sft_weight=0.5).loss_sums(student, batch_of(rows[:4])),
        )
    assert found["kd"].item() == pytest.approx(wanted["kd"].item(), rel=1e-4)
    assert found["sft"].item() == pytest.approx(wanted["sft"].item(), rel=1e-5)
    assert method.token_counts(batch)["kd"] == sum(len(r["completion"]) for r in rows[:4])


def test_spans_of_one_example_do_not_reach_into_the_next(other, teacher, student):
    method = KD(other, OtherTokenizer(teacher, TOK), "spans_likelihood")
    pupil, rows = (
        mini_model("causal", "xs", len(other), seed=0),
        [method.encode(d) for d in dialogues(3)],
    )
    with torch.no_grad():
        together = method.loss_sums(pupil, method.collate(rows))["kd"].item()
        alone = sum(method.loss_sums(pupil, method.collate([r]))["kd"].item() for r in rows)
    assert together == pytest.approx(alone, rel=1e-4)


# --- cached -------------------------------------------------------------------------------------------------------------------------


def test_a_full_cache_is_the_live_teacher(tmp_path, rows, teacher, student):
    cache = write_cache(tmp_path / "c", teacher, TOK, rows, k=V, dtype="float32")
    cached, live = (
        KD(TOK, cache, sft_weight=0.5),
        KD(TOK, teacher, sft_weight=0.5),
    )
    batch = cached.collate([cached.encode(r) for r in rows[:4]])
    with torch.no_grad():
        a, b = cached.loss_sums(student, batch), live.loss_sums(student, batch)
    assert a["kd"].item() == pytest.approx(b["kd"].item(), rel=1e-4) and a[
        "sft"
    ].item() == pytest.approx(b["sft"].item(), rel=1e-5)


# --- students -----------------------------------------------------------------------------------------------------------------------


def test_layers_of_the_teacher_make_a_student(teacher):
    model, tok = make_student("layers:0, 2", teacher, TOK)
    assert (
        tok is TOK
        and model.config.num_hidden_layers == 2
        and model.generation_config is teacher.generation_config
    )
    assert torch.equal(
        model.model.layers[1].self_attn.q_proj.weight,
        teacher.model.layers[2].self_attn.q_proj.weight,
    )
    assert make_student("layers:2", teacher, TOK)[0].config.num_hidden_layers == 2
    for wrong in ("layers:", "layers:two", "layers:9", "layers:0,9"):
        with pytest.raises(UserError):
            make_student(wrong, teacher, TOK)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 400), st.one_of(st.floats(0.01, 0.6), st.integers(1, 300)))
def test_holding_out_splits_once_and_for_all(n, share):
    try:
        kept, held = hold_out(list(range(n)), share)
    except UserError:
        assert share >= n or share < 1 and round(share * n) >= n or min(200, share) >= n
        return
    assert sorted(kept + held) == list(range(n)) and 1 <= len(held) <= 200 and kept
    assert (kept, held) == hold_out(list(range(n)), share)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=4, max_size=80), st.floats(0.1, 0.6))
def test_a_prompt_is_on_one_side_of_the_hold_out(numbers, share):
    blanks = ("", " ", "\n")
    asked = [f"ask{blanks[i % 3]}{number}" for i, number in enumerate(numbers)]
    rows = [TextRow(str(i), text, f"answer {i}") for i, text in enumerate(asked)]
    groups = prompt_groups([row.as_chat() for row in rows])
    assert groups.tolist() == [numbers.index(number) for number in numbers]
    assert (groups == prompt_groups(rows)).all()
    plain = held_out_places(len(rows), share)
    smallest = min(Counter(numbers).values())
    held = held_out_places(len(rows), share, groups=groups)
    assert 1 <= len(held) <= len(plain)
    if len(set(numbers)) == len(numbers) or smallest > len(plain):
        assert held == plain
    else:
        inside = {numbers[i] for i in held}
        assert held == [i for i, number in enumerate(numbers) if number in inside]
        assert learnt_too(groups, held) == 0


def test_the_context_is_the_smallest_limit(teacher):
    assert (
        context_of(teacher) == 512
        and context_of(teacher, limit=40) == 40
        and context_of(limit=0) == 0
    )


def test_settings_of_profiles():
    assert distill_settings("cpu").sft_weight == 0.5 and distill_settings("gpu", lr=3e-5).lr == 3e-5
    for wrong in (lambda: distill_settings("laptop"), lambda: distill_settings("cpu", epoch=3)):
        with pytest.raises(UserError):
            wrong()


# --- distill ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher, other):
    "A folder with a teacher, a student with another tokenizer, and a file of chats."
    folder = tmp_path_factory.mktemp("place")
    save_model(teacher, folder / "teacher", TOK)
    save_model(mini_model("causal", "xs", len(other), seed=3), folder / "foreign", other)
    lines = (
        {"messages": [*d.prompt, {"role": "assistant", "content": d.completion}]}
        for d in dialogues(30)
    )
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


QUICK = {
    "max_steps": 3,
    "batch_size": 4,
    "validation": 4,
    "evaluations": 1,
    "device": "cpu",
    "max_new_tokens": 6,
}


def go(place, out, objective="forward_kl", student="layers:2", **more):
    return distill(
        place / "chats.jsonl", str(place / "teacher"), student, objective, out, **QUICK | more
    )


@pytest.mark.parametrize(
    "objective",
    [
        "sft",
        "symmetric_cross_entropy",
        "seqkd",
        "cached_forward_kl",
        "reverse_kl",
        "dkd",
        "atkd",
        "akl",
        "label_revision",
    ],
)
def test_the_folder_loads_like_any_model(place, tmp_path, objective):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = go(place, tmp_path / "out", objective)
    model, tok = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert model.config.num_hidden_layers == 2 and prompt_ids(
        dialogues(1)[0].prompt, tok
    ) == prompt_ids(dialogues(1)[0].prompt, TOK)
    held = [encode_row(d, tok) for d in hold_out(load_rows(place / "chats.jsonl", chat=True), 4)[1]]
    own = Validation(held, tok.pad_token_id)(model)
    assert own["nll"] == pytest.approx(report["results"]["student"]["nll"], rel=1e-5)
    assert (
        set(report["results"]) == {"teacher", "untrained", "student"}
        and "forward_kl" in report["results"]["untrained"]
    )
    assert report == read_json(tmp_path / "out" / "report.json")
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "README.md",
        "curves.png",
        "curves.csv",
        "metrics.jsonl",
    } <= files and "work" not in files


def test_another_tokenizer_is_refused_where_ids_are_compared_and_works_where_text_is(
    place, tmp_path
):
    with pytest.raises(UserError, match="Use spans_matched, uld or seqkd"):
        go(place, tmp_path / "no", student=str(place / "foreign"))
    for objective in ("spans_matched", "seqkd"):
        report = go(place, tmp_path / objective, objective, student=str(place / "foreign"))
        assert (
            "forward_kl" not in report["results"]["student"]
            and report["results"]["student"]["bits_per_byte"] > 0
        )


def test_the_card_and_the_report_name_no_path_of_this_machine(place, tmp_path):
    go(place, tmp_path / "out")
    for name in (
        "README.md",
        "report.json",
        "request.json",
        "config.json",
        "tokenizer_config.json",
    ):
        assert str(place) not in (tmp_path / "out" / name).read_text(), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card and "| untrained |" in card and "apply_chat_template" in card
    go(place, tmp_path / "other", "seqkd", student=str(place / "foreign"))
    # folders of this machine are no models of the hub
    assert "base_model" not in (tmp_path / "other" / "README.md").read_text()


def test_seqkd_learns_what_the_teacher_wrote_and_asks_it_once_per_prompt(
    place, tmp_path, monkeypatch
):
    asked, learned = [], []

    def written(teacher, tokenizer, rows, writing):
        asked.extend(row.id for row in rows)
        return [{"id": row.id, "response": "the teacher said so", "whole": True} for row in rows]

    inner = distill_module.train
    monkeypatch.setattr(seqkd_module, "responses_of", written)
    monkeypatch.setattr(
        distill_module,
        "train",
        lambda model, method, rows, *a, **k: (
            learned.extend(rows) or inner(model, method, rows, *a, **k)
        ),
    )
    go(place, tmp_path / "out", "seqkd")
    assert len(asked) == len(set(asked)) == len(learned)
    assert {TOK.decode(r["completion"], skip_special_tokens=True) for r in learned} == {
        "the teacher said so"
    }


def test_answers_that_are_not_those_of_the_rows_are_an_error(tmp_path):
    rows = [TextRow(name, name, "-") for name in "ab"]
    file = tmp_path / "answers.jsonl"
    lines = [{"id": name, "response": name, "whole": True} for name in "ba"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="should be the answer to 'a', and it is that to 'b'"):
        list(answered_rows(file, rows))


@pytest.mark.parametrize(
    "objective,options",
    [
        ("cached_forward_kl", {"alpha": 0.1}),
        ("sft", {"beta": 0.5}),
        ("reverse_kl", {"beta": 0.5}),
        ("uld", {"alpha": 1}),
        ("akl", {"mu": 2}),
        ("akl", {"boundary": "mine"}),
        ("atkd", {"hard_fraction": 2}),
        ("atkd", {"easy_weight": -1}),
        ("atkd", {"split": 1}),
        ("atkd", {"target_ids": [1]}),
        ("label_revision", {"eta": 1.0}),
        ("label_revision", {"who": "some"}),
        ("gkd", {"parts": [{"divergence": "atkd", "options": {"hard_fraction": 2}}]}),
        ("gkd", {"parts": [{"divergence": "atkd", "options": {"hard": 0.2}}]}),
        ("symmetric_cross_entropy", {"alpha": -1}),
        ("symmetric_cross_entropy", {"alpha": 0, "beta": 0}),
        ("symmetric_cross_entropy", {"gamma": 1}),
    ],
)
def test_options_are_refused_before_a_model_is_loaded(
    place, tmp_path, monkeypatch, objective, options
):
    monkeypatch.setattr(
        request_module, "load_teacher", lambda *a, **k: pytest.fail("the teacher was loaded")
    )
    with pytest.raises(UserError):
        go(place, tmp_path / "out", objective, options=options)
    assert not (tmp_path / "out").exists()  # so that the corrected call may use it


def test_memory_is_announced_before_a_model_is_loaded(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        request_module, "load_teacher", lambda *a, **k: pytest.fail("the teacher was loaded")
    )

    def memory(student="layers:2", teacher=str(place / "teacher"), **settings):
        parts = (place / "chats.jsonl", teacher, student, "forward_kl", tmp_path)
        return expected_memory(Request(*parts, distill_settings("cpu", **settings)))

    assert memory()["total"] > memory(batch_size=1)["total"] > memory()["weights"] > 0
    one = memory()["teacher"]
    assert one > 0
    assert memory(student="nowhere") is None
    twice = TeacherGroup((str(place / "teacher"),) * 2, (0.5, 0.5))
    assert memory(teacher=twice)["teacher"] == 2 * one
    half = TeacherGroup((str(place / "teacher"), "openai:http://127.0.0.1:1/v1#far"), (0.5, 0.5))
    assert memory(teacher=half)["teacher"] == one  # a server's memory is not ours


def test_distill_on_the_command_line(place, tmp_path):
    from typer.testing import CliRunner

    from kd_notes.cli import app

    def command(*more):
        words = [
            "distill",
            "--data",
            str(place / "chats.jsonl"),
            "--teacher",
            str(place / "teacher"),
            "--student",
            "layers:2",
            "--out",
            str(tmp_path / "out"),
        ]
        return CliRunner().invoke(
            app, words + [w for k, v in QUICK.items() for w in ("--set", f"{k}={v}")] + list(more)
        )

    done = command("--objective", "jsd", "--set", "options={'beta': 0.3}")
    assert done.exit_code == 0 and (tmp_path / "out" / "model.safetensors").is_file(), done.output
    assert (
        read_json(tmp_path / "out" / "report.json")["objective"] == "jsd"
        and "GB of memory" in done.output
    )
    wrong = command("--objective", "jsd", "--set", "stepz=3")
    assert wrong.exit_code == 2 and "stepz" in wrong.output and "Traceback" not in wrong.output


def test_bad_input_is_explained_before_anything_is_trained(place, tmp_path):
    (tmp_path / "long.jsonl").write_text(
        "".join(
            json.dumps({"prompt": "a duck " * n, "response": "quack"}) + "\n"
            for n in (1, 1, 300, 1)
        )
    )
    with pytest.raises(UserError, match="long.jsonl:3: the prompt has"):
        distill(
            tmp_path / "long.jsonl",
            str(place / "teacher"),
            "layers:2",
            "sft",
            tmp_path / "a",
            **QUICK | {"validation": 1},
        )
    for wrong in (
        {"objective": "kl"},
        {"student": "layers:x"},
        {"student": "nowhere"},
        {"profile": "big"},
        {"stepz": 3},
    ):
        with pytest.raises(UserError):
            go(place, tmp_path / "b", **wrong)
    with pytest.raises(UserError, match="cannot be read"):
        distill(
            tmp_path / "absent.jsonl",
            str(place / "teacher"),
            "layers:2",
            "sft",
            tmp_path / "c",
            **QUICK,
        )


def test_a_row_that_was_corrected_does_not_need_another_folder(place, tmp_path):
    good = (place / "chats.jsonl").read_text()
    for text, fine in ((good + "{\n", False), (good, True)):
        (tmp_path / "mine.jsonl").write_text(text)
        try:
            distill(
                tmp_path / "mine.jsonl",
                str(place / "teacher"),
                "layers:1",
                "sft",
                tmp_path / "out",
                **QUICK,
            )
        except UserError as e:
            assert not fine and "mine.jsonl:31" in str(e)
    assert (tmp_path / "out" / "report.json").is_file()


def test_a_folder_that_is_something_else_is_left_alone(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a distillation"):
        go(place, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_another_request_for_the_same_folder_is_refused(place, tmp_path):
    go(place, tmp_path / "out")
    for more in ({"objective": "sft"}, {"lr": 1e-2}):
        with pytest.raises(UserError, match="another"):
            go(place, tmp_path / "out", **more)


def changed_in_place(folder, name, old, new):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


def test_an_output_that_is_a_file_is_one_clear_error(place, tmp_path):
    (tmp_path / "taken").write_text("a file")
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(UserError, match="taken.*could not be written"):
            go(place, out)


@pytest.mark.parametrize("weights", [b"", b"xx", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_weights_are_one_clear_error(place, tmp_path, weights):
    twin = tmp_path / "twin"
    shutil.copytree(place / "teacher", twin)
    (twin / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="twin"):
        distill(place / "chats.jsonl", str(twin), "layers:1", "sft", tmp_path / "out", **QUICK)
    with pytest.raises(UserError, match="twin"):
        load_teacher(twin)


@pytest.mark.parametrize("name", ["{a}", "100% [x] ü", "new\nline", "two words"])
def test_an_output_with_an_odd_name(place, tmp_path, name):
    assert go(place, tmp_path / name, "sft")["rows"] == 26
    assert (tmp_path / name / "report.json").is_file()


LAYOUTS = {
    "the teacher's config": ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.01'),
    "its generation config": ("generation_config.json", "{", '{"eos_token_id": [1, 3],'),
    "its tokenizer": ("tokenizer.json", '"fuse_unk": false', '"fuse_unk": true'),
    "its chat template": ("tokenizer_config.json", "{", '{"chat_template": "{{ messages[0].content }}",'),
}  # fmt: skip


@pytest.mark.parametrize("what", LAYOUTS)
def test_a_model_changed_in_place_is_another_request(place, tmp_path, what):
    twin = tmp_path / "twin"
    shutil.copytree(place / "teacher", twin)
    data, out = place / "chats.jsonl", tmp_path / "out"
    distill(data, str(twin), "layers:1", "sft", out, **QUICK)
    assert distill(data, str(twin), "layers:1", "sft", out, **QUICK)["objective"] == "sft"
    changed_in_place(twin, *LAYOUTS[what])
    with pytest.raises(UserError, match="another teacher_layout"):
        distill(data, str(twin), "layers:1", "sft", out, **QUICK)


def test_another_template_of_a_tokenizer_object_is_another_request(teacher, tmp_path):
    rows = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(12)]
    fresh = [load_mini_tokenizer() for _ in range(3)]
    fresh[2].chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for tokenizer in fresh[:2]:  # a second process reads the tokenizer anew
        distill(rows, (teacher, tokenizer), "layers:1", "sft", tmp_path / "out", **QUICK)
    with pytest.raises(UserError, match="another teacher_layout"):
        distill(rows, (teacher, fresh[2]), "layers:1", "sft", tmp_path / "out", **QUICK)


def test_answers_of_a_teacher_with_other_ends_are_not_continued(tmp_path, teacher):
    path, asked = tmp_path / "a.jsonl", dialogues(2)
    write_responses(path, teacher, TOK, asked, Writing("greedy", 4))
    other_end = copy.deepcopy(teacher)
    other_end.generation_config.eos_token_id = [5]
    with pytest.raises(UserError, match="ends"):
        write_responses(path, other_end, TOK, asked, Writing("greedy", 4))


def with_window(model, window=2):
    "Return a copy with the same weights that computes something else."
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": float(window)}
    other = type(model)(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_answers_of_the_same_weights_with_another_config_are_not_continued(tmp_path, teacher):
    path, asked = tmp_path / "a.jsonl", dialogues(2)
    write_responses(path, teacher, TOK, asked, Writing("greedy", 4))
    with pytest.raises(UserError, match="config"):
        write_responses(path, with_window(teacher), TOK, asked, Writing("greedy", 4))


def test_what_the_caller_has_frozen_stays_as_it_is(teacher, tmp_path):
    rows = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(12)]
    student = mini_model("causal", "xs", V, seed=2)
    frozen = student.model.layers[0].requires_grad_(False).state_dict()
    before = {name: value.clone() for name, value in frozen.items()}
    distill(rows, (teacher, TOK), (student, TOK), "forward_kl", tmp_path / "out", **QUICK)
    made = load_pretrained(tmp_path / "out", device="cpu")[0].model
    after = made.layers[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    name = "mlp.up_proj.weight"
    assert not torch.equal(
        made.layers[1].state_dict()[name], student.model.layers[1].state_dict()[name]
    )


def test_an_adapted_student_learns_in_its_adapter_alone(teacher, tmp_path):
    from peft import get_peft_model, LoraConfig

    rows = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(12)]
    student = mini_model("causal", "xs", V, seed=2)
    untouched = student.model.layers[0].mlp.up_proj.weight.detach().clone()
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"]))
    distill(rows, (teacher, TOK), (adapted, TOK), "forward_kl", tmp_path / "out", **QUICK)
    made = load_pretrained(tmp_path / "out", device="cpu")[0].model.layers[0]
    assert torch.equal(made.mlp.up_proj.weight, untouched)
    before = student.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(made.self_attn.q_proj.weight, before)


LONG = {
    "max_steps": 40,
    "evaluations": 2,
    "batch_size": 4,
    "validation": 4,
    "device": "cpu",
    "max_new_tokens": 6,
}
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from kd_notes.products.distill import distill
distill({data!r}, {teacher!r}, "layers:2", {objective!r}, {out!r}, **{settings!r})
"""


def start(place, out, objective):
    code = SCRIPT.format(
        data=str(place / "chats.jsonl"),
        teacher=str(place / "teacher"),
        objective=objective,
        out=str(out),
        settings=LONG,
    )
    return start_script(code)


def wait_for(process, ready):
    for _ in range(1200):
        if ready():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    raise AssertionError("it never came so far")


@pytest.mark.parametrize("objective", ["cached_forward_kl", "gkd"])
def test_a_killed_distillation_ends_as_if_nothing_had_happened(place, tmp_path, objective):
    "kill -9 in the middle of the training; the same call then gives the same student, to the bit, as an uninterrupted one."
    process = start(place, tmp_path / "killed", objective)
    assert wait_for(
        process,
        lambda: any((tmp_path / "killed" / "work" / "train" / "checkpoints").glob("step-*")),
    ), process.stderr.read().decode()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "report.json").exists()
    torch.set_num_threads(1)
    job = (place / "chats.jsonl", str(place / "teacher"), "layers:2", objective)
    reports = [distill(*job, tmp_path / name, **LONG) for name in ("killed", "whole")]
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert reports[0]["results"] == reports[1]["results"]


def test_two_processes_do_not_share_a_folder(place, tmp_path):
    from kd_notes.core import folder_lock

    (tmp_path / "out").mkdir()
    with folder_lock(tmp_path / "out"):
        process = start(place, tmp_path / "out", "sft")
        process.wait()
    assert "another process is working" in process.stderr.read().decode()


def test_every_objective_is_described():
    assert all(len(text) > 10 for text in OBJECTIVES.values())
    assert {"sft", "forward_kl", "reverse_kl", "jsd", "seqkd", "uld"} <= set(OBJECTIVES)


# --- embedded prompts ---------------------------------------------------------------------------------------------------------------


def test_the_prompts_are_whole_and_their_splits_disjoint():
    splits = {s: load_prompts(s) for s in PROMPT_SPLITS}
    assert {s: len(ds) for s, ds in splits.items()} == PROMPT_SPLITS
    texts = [d.prompt[0]["content"] for ds in splits.values() for d in ds]
    assert len(set(texts)) == len(texts) and all(d.completion for ds in splits.values() for d in ds)
    for split, ds in splits.items():
        assert {d.prompt[0]["content"] for d in ds} <= set(prompt_texts(split))
    from kd_notes.core import data_dir

    assert sum(
        p.stat().st_size for p in (data_dir() / "prompts").iterdir()
    ) < 1e6 and verify_checksums(data_dir() / "prompts")


# --- equal wall time ----------------------------------------------------------------------------------------------------------------


def test_the_mean_of_the_item_table_is_the_token_mean():
    sums, tokens = [[2.0, 3.0, 1.0], [1.0, 1.0, 4.0]], [4, 1, 5]
    table = item_table([pack_numbers(s) for s in sums], sum(tokens))
    assert table.shape == (2, 3) and table.mean(1) == pytest.approx([0.6, 0.6])


def test_a_budget_pays_for_the_cache_first():
    costs = {
        "seconds_per_token": {"sft": 0.01, "cached": 0.01, "kd": 0.02},
        "cache_seconds": 20.0,
        "tokens_per_step": 100.0,
    }
    assert [steps_for(costs, arm, 60.0) for arm in ("sft", "cached", "kd")] == [60, 40, 30]
    with pytest.raises(UserError, match="not enough"):
        steps_for(costs, "cached", 20.5)


@pytest.fixture
def tiny(place, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "cache"))
    return pair(
        n=16,
        held_out=6,
        teacher=str(place / "teacher"),
        student="layers:2",
        max_length=400,
        top_k=8,
    )


@pytest.mark.parametrize("arm", list(PAIR_ARMS))
def test_an_arm_is_a_function_of_its_parameters(tiny, tmp_path, arm):
    first, again = (
        EqualTime().train(tiny | {"arm": arm, "seed": 1, "steps": 3}, tmp_path / str(i))
        for i in range(2)
    )
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in again.items() if k != "seconds"
    }
    assert item_table([first["items"]["nll"]], first["tokens"]).mean() == pytest.approx(
        first["nll"], rel=1e-5
    )
    assert (
        len(json.dumps({"params": tiny, "metrics": first})) < 1900
    )  # a recorded run takes 2,048 bytes


def test_costs_and_references(tiny, tmp_path):
    costs = PairCosts().train(
        tiny | {"arms": ["sft", "kd", "cached"], "rounds": 1, "steps": 2}, tmp_path
    )
    assert (
        costs["cache_seconds"] > 0
        and set(costs["seconds_per_token"]) == {"sft", "kd", "cached"}
        and min(costs["seconds_per_token"].values()) > 0
    )
    found = PairReferences().train(tiny, tmp_path)
    assert (
        found["teacher"]["forward_kl"] == pytest.approx(0, abs=1e-6)
        and found["untrained"]["forward_kl"] > 0
    )


def test_dolly_comes_from_the_named_folder_in_three_disjoint_parts(tmp_path, monkeypatch, tiny):
    for part, numbers in (("train", range(20)), ("dev", range(15, 35))):
        lines = (
            {"id": f"{part}-{i}", "instruction": f"Say {i}.", "input": "", "output": f"It is {i}."}
            for i in numbers
        )
        (tmp_path / f"dolly_{part}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    parts = {
        s: {d.prompt[0]["content"] for d in dolly_dialogues(s)}
        for s in ("train", "validation", "test")
    }
    assert [len(parts[s]) for s in parts] == [20, 8, 7] and len(set.union(*parts.values())) == 35
    assert len(pair_rows(tiny | {"data": "dolly", "n": 5}, "train", TOK)) == 5
    monkeypatch.delenv("KD_NOTES_DATA")
    with pytest.raises(UserError, match="dolly_train.jsonl is not here"):
        dolly_dialogues("train")


def test_one_real_step_of_smollm2(tmp_path):
    "The real pair: six layers of SmolLM2 start far from it, and two steps of KD bring them nearer."
    pytest.importorskip("gguf")
    from kd_notes.core import data_dir

    report = distill(
        data_dir() / "prompts" / "train.jsonl",
        "smollm2",
        "layers:6",
        "forward_kl",
        tmp_path / "out",
        profile="smoke",
        n=6,
        validation=2,
        system="",
        sft_weight=0.0,
        lr=1e-3,
    )
    before, after = report["results"]["untrained"], report["results"]["student"]
    assert after["forward_kl"] < before["forward_kl"] and before["forward_kl"] > 1
    assert 40e6 < report["parameters"] < 60e6
    shutil.rmtree(tmp_path / "out")


def test_the_plain_template_marks_every_turn():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    said = TOK.apply_chat_template(chat, chat_template=PLAIN_TEMPLATE, tokenize=False)
    assert said == "### Instruction:\nHi\n\n### Response:\nHo</s>\n\n"


def test_a_teacher_signal_without_a_divergence_fails_when_it_is_made():
    from kd_notes.methods.logit_kd import TeacherSignal

    class Silent(TeacherSignal):
        pass

    with pytest.raises(TypeError, match="divergence"):
        Silent()
