"""Generated data: the energy, the band, the loop and its file, symmetric cross-entropy."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_notes.core import read_jsonl, rng, UserError
from kd_notes.data.rows import TextRow
from kd_notes.experiments import data_generation
from kd_notes.experiments.data_generation import (
    checked,
    fit_student,
    GeneratedRows,
    GeneratedStudents,
    GENERATION_ARMS,
    label_odds,
    numbers_of,
    read_after,
    student_logits,
    WriterScores,
    written_metrics,
)
from kd_notes.experiments.generation_tasks import (
    draw_page,
    GENERATION_TASKS,
    KeptTexts,
    NAMES,
    RARE,
    real_inputs,
    remark_tokenizer,
    remarks,
    SUBJECTS,
    true_label,
)
from kd_notes.generation.backends import LocalBackend
from kd_notes.generation.completions import Completion, Decoding
from kd_notes.losses.divergences import IGNORED
from kd_notes.methods.data_generation import (
    energy,
    FEEDBACK,
    feedback_of,
    generate_rows,
    GenerationSettings,
    row_energies,
    rows_of,
    symmetric_cross_entropy,
    SymmetricSFT,
    WritingTask,
)
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.training.loop import train
from kd_notes.training.method import SFT
from kd_notes.training.state import TrainConfig

TASK = WritingTask(("good", "bad"))
EXEMPLARS = [TextRow("e0", "a b", "good"), TextRow("e1", "c d", "bad")]
BOUND = 9.210340371976184  # -log(1e-4)


def write(prompts, stream):
    "A teacher whose text depends on the prompt, the stream and the place alone."
    marks = [sum(map(ord, prompt)) for prompt in prompts]
    return [f" {stream} {i} {mark}\nrest" for i, mark in enumerate(marks)]


def study(rows):
    "A student whose energies depend on the rows that it studied."
    known = sum(len(row.prompt) for row in rows)
    return lambda others: [math.sin(known + sum(map(ord, row.prompt))) for row in others]


# --- energy -----------------------------------------------------------------------------------------------------------------------


def test_energy_moves_with_a_constant_and_is_minus_the_logsumexp():
    logits = torch.randn(3, 2, 7, dtype=torch.float64)
    labels = torch.zeros(3, 2)
    assert torch.allclose(energy(logits + 5, labels), energy(logits, labels) - 5)
    by_hand = -sum(math.log(sum(math.exp(x) for x in row)) for row in logits[0].tolist()) / 2
    assert energy(logits, labels)[0].item() == pytest.approx(by_hand, abs=1e-12)


def test_energy_of_the_fixture():
    logits = torch.tensor([[[0.0, 1.0, 0.5, -0.5]]], dtype=torch.float64)
    assert energy(logits, torch.zeros(1, 1)).item() == pytest.approx(-1.787339, abs=1e-6)


def test_energy_of_a_sure_student_is_minus_its_largest_logit():
    logits = torch.zeros(1, 3, 50)
    logits[..., 8] = 40.0
    assert energy(logits, torch.zeros(1, 3)).item() == pytest.approx(-40.0, abs=1e-4)


def test_padding_enters_the_energy_of_the_released_code_and_not_ours():
    logits = torch.randn(2, 4, 9)
    labels = torch.tensor([[1, 2, IGNORED, IGNORED], [1, 2, 3, 4]])
    poisoned = logits.clone()
    poisoned[0, 2:] = 1e6
    assert torch.equal(energy(poisoned, labels), energy(logits, labels))
    moved = energy(poisoned, labels, padded=True) - energy(logits, labels, padded=True)
    assert moved[0] < -1e5 and moved[1] == 0
    alone = energy(logits[:1, :2], labels[:1, :2])
    assert torch.allclose(energy(logits, labels)[:1], alone)


def test_a_row_without_target_is_named():
    with pytest.raises(UserError, match="row 1 of the batch"):
        energy(torch.zeros(2, 1, 3), torch.tensor([[1], [IGNORED]]))


def test_masked_vocabulary_gives_a_finite_energy_and_half_precision_is_widened():
    logits = torch.full((1, 1, 5), -math.inf)
    logits[..., 2] = 3.0
    assert energy(logits, torch.zeros(1, 1)).item() == pytest.approx(-3.0)
    wide = torch.full((1, 1, 30_000), 8.0, dtype=torch.bfloat16)
    assert energy(wide, torch.zeros(1, 1)).item() == pytest.approx(-8 - math.log(30_000), abs=1e-4)


def test_energies_of_rows_are_those_of_the_logits_at_their_labels_whatever_the_batch():
    tokenizer = load_mini_tokenizer()
    model = mini_model("causal", "xxs", len(tokenizer), seed=3)
    rows = [TextRow("a", "Premise: it rains", "neutral"), TextRow("b", "no", "it is a long label")]
    method = SFT(tokenizer)
    found = row_energies(model, method, rows)
    assert model.training
    for row, value in zip(rows, found):
        item = method.encode(row)
        ids = torch.tensor([item["prompt"] + item["completion"]])
        start = len(item["prompt"]) - 1
        with torch.no_grad():
            logits = model(ids).logits[:, start:-1]
        assert value == pytest.approx(energy(logits, ids[:, start + 1 :]).item(), abs=1e-5)
    assert row_energies(model, method, rows, batch_size=1) == pytest.approx(found, abs=1e-5)


# --- the band ---------------------------------------------------------------------------------------------------------------------


def test_the_band_of_eight_rows_holds_ranks_four_and_five():
    energies = [5.0, 1.0, 7.0, 3.0, 0.0, 2.0, 6.0, 4.0]
    pick = {kind: feedback_of(energies, kind, rng("t", 1)) for kind in FEEDBACK}
    assert [energies[i] for i in pick["band"]] == [4.0, 5.0]
    assert [energies[i] for i in pick["lowest"]] == [0.0, 1.0]
    assert [energies[i] for i in pick["top"]] == [6.0, 7.0]
    assert pick["none"] == [] and len(set(pick["random"])) == 2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=3, max_size=40), st.integers(0, 99))
def test_all_kinds_feed_back_equally_many_rows_and_the_band_leaves_out_both_ends(energies, seed):
    n = len(energies)
    count = int(0.8 * n) - int(0.5 * n)
    for kind in set(FEEDBACK) - {"none"}:
        chosen = feedback_of(energies, kind, rng("t", seed))
        assert len(set(chosen)) == count
    ranked = sorted(energies)
    band = [energies[i] for i in feedback_of(energies, "band", rng("t", seed))]
    assert band == ranked[int(0.5 * n) : int(0.8 * n)]


def test_the_random_band_is_not_always_the_same():
    energies = list(range(8))
    assert len({tuple(feedback_of(energies, "random", rng("t", i))) for i in range(20)}) > 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_energy_that_is_not_finite_is_an_error(bad):
    with pytest.raises(UserError, match="not finite"):
        feedback_of([0.0, bad, 1.0], "band", rng("t", 0))


# --- symmetric cross-entropy ------------------------------------------------------------------------------------------------------


def in_the_clamps_of_the_code(logits, labels, alpha, beta):
    "The released code's form, with one-hot rows and both clamps."
    q = logits.softmax(-1).clamp(1e-7, 1)
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(q).clamp(1e-4, 1)
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return alpha * ce - beta * (q * one_hot.log()).sum(-1)


def test_closed_form_is_that_of_the_code():
    logits = 3 * torch.randn(50, 6, dtype=torch.float64)
    labels = torch.randint(0, 6, (50,))
    for alpha, beta in ((0.01, 1.0), (1.0, 1.0), (0.1, 2.0)):
        ours = symmetric_cross_entropy(logits, labels, alpha, beta)
        theirs = in_the_clamps_of_the_code(logits, labels, alpha, beta)
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_limits_of_symmetric_cross_entropy():
    logits = torch.tensor([[60.0, 0.0], [0.0, 0.0], [0.0, 60.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0])
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(symmetric_cross_entropy(logits, labels, 1, 0), plain)
    reverse = symmetric_cross_entropy(logits, labels, 0, 1).tolist()
    assert reverse == pytest.approx([0.0, BOUND / 2, BOUND], abs=1e-9)


def test_gradient_of_the_reverse_term_is_minus_bound_q_one_minus_q_and_zero_at_a_sure_label():
    logits = torch.tensor([[1.0, -0.5, 0.2], [80.0, 0.0, 0.0]], dtype=torch.float64)
    logits.requires_grad_()
    symmetric_cross_entropy(logits, torch.tensor([0, 0]), 0, 1).sum().backward()
    q = logits.detach().softmax(-1)
    by_hand = BOUND * q * (q[:, :1] - torch.tensor([1.0, 0.0, 0.0]))
    by_hand[:, 0] = -BOUND * q[:, 0] * (1 - q[:, 0])
    expected = BOUND * q[:, :1] * (q - torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert torch.allclose(logits.grad[:, 0], by_hand[:, 0], atol=1e-9)
    assert torch.allclose(logits.grad, expected, atol=1e-9)
    assert logits.grad[1].abs().max() < 1e-12


def test_ignored_positions_and_masked_words_are_harmless():
    logits = torch.randn(3, 4)
    labels = torch.tensor([1, IGNORED, 2])
    poisoned = logits.clone()
    poisoned[1] = math.nan
    poisoned[0, 3] = -math.inf
    poisoned.requires_grad_()
    found = symmetric_cross_entropy(poisoned, labels)
    assert found[1] == 0 and torch.isfinite(found).all()
    shifted = symmetric_cross_entropy(logits + 9, labels)
    assert torch.allclose(shifted, symmetric_cross_entropy(logits, labels), atol=1e-5)
    # the label itself masked: infinite as cross-entropy, the bound as reverse cross-entropy
    masked = torch.tensor([[-math.inf, 0.0]])
    assert symmetric_cross_entropy(masked, torch.tensor([0]), 0, 1).item() == pytest.approx(BOUND)


@pytest.mark.parametrize("alpha, beta", [(-1, 1), (1, math.nan), (math.inf, 0), (0, 0)])
def test_impossible_weights_are_errors(alpha, beta):
    said = "is not a weight|no term is left"
    with pytest.raises(UserError, match=said):
        symmetric_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), alpha, beta)
    with pytest.raises(UserError, match=said):
        SymmetricSFT(load_mini_tokenizer(), alpha, beta)


def test_the_method_with_alpha_one_and_beta_zero_is_sft_and_padding_changes_nothing():
    tokenizer = load_mini_tokenizer()
    rows = [TextRow("a", "one two", "x"), TextRow("b", "three", "a longer one"), *EXEMPLARS]
    cfg = TrainConfig(max_steps=4, batch_size=2, lr=1e-2, device="cpu")
    models = [mini_model("causal", "xxs", len(tokenizer), seed=1) for _ in range(2)]
    train(models[0], SFT(tokenizer), rows, cfg)
    train(models[1], SymmetricSFT(tokenizer, 1.0, 0.0), rows, cfg)
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.allclose(a, b, atol=1e-5)
    method = SymmetricSFT(tokenizer, 0.1)
    items = [method.encode(row) for row in rows]
    together = method.loss_sums(models[0], method.collate(items))
    alone = [method.loss_sums(models[0], method.collate([item])) for item in items]
    for term, total in together.items():
        assert total.item() == pytest.approx(sum(part[term].item() for part in alone), rel=1e-4)


# --- the loop ---------------------------------------------------------------------------------------------------------------------


def test_feedback_stands_in_every_second_prompt_and_comes_from_the_last_validation_batch(tmp_path):
    seen = []

    def listening(prompts, stream):
        seen.append((stream, prompts))
        return write(prompts, stream)

    wanted = GenerationSettings(batches=6, study_every=2)
    path = tmp_path / "rounds.jsonl"
    rows = generate_rows(listening, study, TASK, EXEMPLARS, wanted, path=path)
    rounds = read_jsonl(path)
    assert len(rows) == 6 * 16 and len({row.id for row in rows}) == len(rows)
    assert [row.completion for row in rows[:4]] == ["good", "bad", "good", "bad"]
    assert rounds[0]["energies"] == [] and rounds[0]["feedback"] == []  # no student yet
    assert all(len(found["feedback"]) == 2 for found in rounds[1:])
    train_prompts = [prompts[0] for stream, prompts in seen if stream.startswith("train")]
    for number, prompt in enumerate(train_prompts):
        fed = [rounds[number - 1]["validation"][i][1] for i in rounds[number - 1]["feedback"]]
        shown = [text for text in fed if text in prompt]
        assert shown == (fed if number and number % 2 == 0 else [])
    different = [prompts for stream, prompts in seen if stream.startswith("validation")]
    assert all(p == different[0] for p in different)  # never with feedback
    assert "Something very different" in different[0][0]


def test_the_student_studies_every_row_so_far_without_the_validation_batch_to_score():
    studied = []

    def listening(rows):
        studied.append([row.id for row in rows])
        return study(rows)

    generate_rows(write, listening, TASK, EXEMPLARS, GenerationSettings(batches=5, study_every=2))
    assert [len(ids) for ids in studied] == [24, 56]
    assert studied[0] == [
        f"{kind}-{i}" for kind in ("train 0", "validation 0", "train 1") for i in range(8)
    ]


def test_the_kinds_of_feedback_write_equally_many_rows():
    lengths = set()
    for kind in FEEDBACK:
        wanted = GenerationSettings(batches=4, study_every=1, feedback=kind)
        lengths.add(len(generate_rows(write, study, TASK, EXEMPLARS, wanted)))
    assert lengths == {64}


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_stopped_run_goes_on_to_the_same_rows_and_asks_for_no_batch_twice(tmp_path, stop):
    wanted = GenerationSettings(batches=7, study_every=2, show_every=1)
    whole = generate_rows(write, study, TASK, EXEMPLARS, wanted)
    path = tmp_path / "rounds.jsonl"
    asked = []

    def breaking(prompts, stream):
        if stream == f"validation {stop}" and stream not in asked:
            asked.append(stream)
            raise KeyboardInterrupt
        asked.append(stream)
        return write(prompts, stream)

    with pytest.raises(KeyboardInterrupt):
        generate_rows(breaking, study, TASK, EXEMPLARS, wanted, path=path)
    assert len(read_jsonl(path)) == stop
    asked_before = list(asked)
    assert generate_rows(breaking, study, TASK, EXEMPLARS, wanted, path=path) == [
        *map(lambda row: TextRow(row.id, row.prompt, row.completion), whole)
    ]
    again = asked[len(asked_before) :]
    assert again[0] == f"train {stop}" and len(again) == 2 * (7 - stop)
    assert generate_rows(breaking, study, TASK, EXEMPLARS, wanted, path=path)
    assert len(asked) == len(asked_before) + len(again)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_data_generation import EXEMPLARS, generate_rows, GenerationSettings, study, TASK, write

def slow(prompts, stream):
    time.sleep(0.05)
    return write(prompts, stream)

wanted = GenerationSettings(batches=40, study_every=3)
generate_rows(slow, study, TASK, EXEMPLARS, wanted, path={path!r})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_loses_nothing_but_the_open_round(tmp_path):
    path = tmp_path / "rounds.jsonl"
    code = KILLED.format(tests=os.path.dirname(__file__), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code])
    start = time.time()
    while not (path.exists() and len(path.read_bytes().splitlines()) >= 4):
        assert process.poll() is None and time.time() - start < 60
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = path.read_bytes()
    wanted = GenerationSettings(batches=40, study_every=3)
    rows = generate_rows(write, study, TASK, EXEMPLARS, wanted, path=path)
    whole = generate_rows(write, study, TASK, EXEMPLARS, wanted)
    assert [r.prompt for r in rows] == [r.prompt for r in whole]
    complete = before[: before.rfind(b"\n") + 1]
    assert path.read_bytes().startswith(complete) and len(read_jsonl(path)) == 40
    assert rows_of(read_jsonl(path)) == rows


def test_a_file_of_other_settings_exemplars_or_teacher_is_refused(tmp_path):
    path = tmp_path / "rounds.jsonl"
    wanted = GenerationSettings(batches=2, study_every=1)
    generate_rows(write, study, TASK, EXEMPLARS, wanted, path=path, teacher="one")
    before = path.read_bytes()
    other = GenerationSettings(batches=2, study_every=1, feedback="top")
    for exemplars, kind, teacher in (
        (EXEMPLARS, other, "one"),
        (EXEMPLARS[:1], wanted, "one"),
        (EXEMPLARS, wanted, "two"),
    ):
        with pytest.raises(UserError, match="another job"):
            generate_rows(write, study, TASK, exemplars, kind, path=path, teacher=teacher)
    assert path.read_bytes() == before


def test_empty_rows_are_left_out_and_a_teacher_that_writes_none_is_an_error():
    wanted = GenerationSettings(batches=2, study_every=1)

    def some(prompts, stream):
        return ["\n" if i == 3 else text for i, text in enumerate(write(prompts, stream))]

    assert len(generate_rows(some, study, TASK, EXEMPLARS, wanted)) == 2 * 14
    with pytest.raises(UserError, match="only empty rows"):
        generate_rows(lambda p, s: ["\nx"] * len(p), study, TASK, EXEMPLARS, wanted)
    with pytest.raises(UserError, match="train 0: the teacher returned 1 texts for 8 prompts"):
        generate_rows(lambda p, s: ["x"], study, TASK, EXEMPLARS, wanted)
    with pytest.raises(UserError, match="0 energies for 8 rows"):
        generate_rows(write, lambda rows: lambda others: [], TASK, EXEMPLARS, wanted)
    with pytest.raises(UserError, match="no exemplar"):
        generate_rows(write, study, TASK, [], wanted)


@pytest.mark.parametrize(
    "wrong", [{"batches": 0}, {"batch_size": 2}, {"feedback": "best"}, {"study_every": 0.5}]
)
def test_impossible_settings_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        GenerationSettings(**wrong)


def test_a_task_needs_labels_and_reads_up_to_its_end():
    with pytest.raises(UserError, match="no labels"):
        WritingTask(())
    with pytest.raises(UserError, match="no labels"):
        WritingTask(("good", " "))
    assert TASK.read("  a row \nanother\n") == "a row"
    assert TASK.prompt(EXEMPLARS, "bad") == "good: a b\nbad: c d\nbad:"


# --- the embedded world and the experiment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, label, subject",
    [
        ("the soup was warm", "good", "soup"),
        ("the soup was not warm", "bad", "soup"),
        ("nobody called the hull leaky", "good", "boat"),
        ("they found the saw blunt but sharp", "good", "tool"),
        ("a dull film", "bad", "film"),
        ("the soup was leaky", "", ""),  # a word of another subject
        ("the soup film was warm", "", ""),
        ("the soup was", "", ""),
        ("", "", ""),
    ],
)
def test_the_oracle_by_hand(text, label, subject):
    assert true_label(text) == (label, subject)


def test_words_belong_to_one_subject_and_drawn_remarks_have_their_label():
    words = [word for parts in SUBJECTS.values() for part in parts for word in part]
    assert len(set(words)) == len(words) == 12 * 13
    rows = remarks(300, "test of the test", NAMES)
    assert {true_label(row.prompt)[0] == row.completion for row in rows} == {True}
    assert {true_label(row.prompt)[1] for row in rows} == set(NAMES)
    usual = [true_label(row.prompt)[1] for row in remarks(600, "usual ones")]
    assert 0.05 < sum(name in RARE for name in usual) / 600 < 0.25
    unknown = remark_tokenizer().unk_token_id
    page = draw_page(rng("page", 0), 0.5)
    assert unknown not in remark_tokenizer()(page).input_ids


def test_tests_validation_exemplars_and_gold_are_drawn_apart():
    task = GENERATION_TASKS["remarks"]
    ids = [{row.id.rpartition("-")[0] for row in rows} for rows in task.tests().values()]
    ids += [
        {row.id.rpartition("-")[0] for row in rows} for rows in (task.validation(), task.gold(9, 0))
    ]
    assert len(set.union(*ids)) == 4
    assert {true_label(row.prompt)[1] for row in task.exemplars(0)} <= set(NAMES[:2])
    assert {true_label(row.prompt)[1] for row in task.tests()["rare"]} == set(RARE)


def test_kept_texts_open_no_model_and_differ_by_prompt_stream_and_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    opened = []

    class Echo:
        def generate(self, requests, decoding):
            for name, prompt in reversed(list(requests)):
                yield Completion(name, f" {prompt} {name} ", 1, 1, "stop", 0.0)

    def backend():
        opened.append(1)
        return Echo()

    decoding = Decoding(temperature=1.0, seed=1)
    first = KeptTexts(backend, decoding, "echo")(["a", "b"], "train 0")
    assert first == ["a train 0 0", "b train 0 1"] and len(opened) == 1
    again = KeptTexts(backend, decoding, "echo")
    assert again(["a", "b"], "train 0") == first and len(opened) == 1
    again(["a", "b"], "train 1")
    again(["b", "a"], "train 0")
    KeptTexts(backend, Decoding(temperature=1.0, seed=2), "echo")(["a", "b"], "train 0")
    assert len(opened) == 4


def test_counts_of_rounds_by_hand():
    good = ["x", "the soup was warm", "good"]
    wrong = ["y", "the hull was leaky", "good"]
    found = {"train": [good, wrong], "validation": [good, wrong] * 5, "feedback": []}
    found["energies"] = [float(i % 2) for i in range(10)]  # the wrong ones have the higher energy
    metrics = written_metrics("remarks", [found])
    assert metrics["rows"] == 12 and metrics["wrong"] == metrics["rare"] == 0.5
    assert metrics["different"] == 2 and metrics["words"] == 48
    assert metrics["fifths"] == [[2, 0, 0], [2, 0, 0], [2, 1, 1], [2, 2, 2], [2, 2, 2]]
    assert [shown[3] for shown in metrics["shown"]] == [False, True, True, True]
    assert written_metrics("remarks", [found | {"energies": []}])["fifths"] == [[0, 0, 0]] * 5
    rows = [TextRow(*good), TextRow(*wrong)]
    assert checked("remarks", rows) == [(False, False), (True, True)]


def test_a_student_learns_from_true_rows_and_repeats_itself():
    rows = remarks(160, "small")
    models = [fit_student("remarks", rows, 1, 150, 0.01) for _ in range(2)]
    right = student_logits("remarks", models[0], rows).argmax(1) == numbers_of("remarks", rows)
    assert right.double().mean() > 0.9
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(a, b)


def test_runs_of_the_experiment_end_in_comparable_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    small = {"batches": 2, "batch_size": 8, "study_every": 1, "study_steps": 3}
    small["teacher"] = {"steps": 3, "pages": 40}
    students = GeneratedStudents()
    cells = [
        {"task": "remarks", "arm": arm, "lr": 0.01, "written": 0, "steps": 3, "rows": small}
        for arm in ("gold", "none", "band_sce")
    ]
    found = [
        r["metrics"] for r in students.results(students.parameters(**c, seed=0) for c in cells)
    ]
    assert found[0]["rows"] == 32 and all(0 < m["rows"] <= 32 for m in found)
    assert {len(m["rare: outcomes"]) for m in found} == {4 + 125}
    run = GeneratedRows().parameters(task="remarks", arm="none", seed=0, **small)
    assert GeneratedRows().cached(run)["rows"] == found[1]["rows"]
    valid = students.parameters(**cells[1], seed=0, score_on="validation")
    assert set(students.train(valid, tmp_path)) == {"rows", "own", "accuracy"}


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="there is no task 'jokes'"):
        GeneratedRows().parameters(task="jokes", arm="band", seed=0)
    with pytest.raises(UserError, match="there is no arm"):
        GeneratedRows().parameters(task="remarks", arm="best", seed=0)
    with pytest.raises(UserError, match="'tset' is no set to score on"):
        wrong = {"arm": "band", "seed": 0, "lr": 0.1, "written": 0, "score_on": "tset"}
        GeneratedStudents().parameters(task="remarks", **wrong)
    monkeypatch.delenv("KD_NOTES_DATA", raising=False)
    with pytest.raises(UserError, match="sst2_train.jsonl is not part of this package"):
        real_inputs("reviews")
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    (tmp_path / "sst2_train.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="sst2_dev.jsonl is not .*not here.*goemotions_dev.jsonl"):
        real_inputs("reviews")
    assert real_inputs("remarks") == {}
    assert {arm.feedback for arm in GENERATION_ARMS.values()} == {*FEEDBACK, ""}


# --- the writer as a classifier ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_writer(monkeypatch):
    tokenizer = load_mini_tokenizer()
    backend = LocalBackend(mini_model("causal", "xs", len(tokenizer), seed=0), tokenizer)
    monkeypatch.setattr(data_generation, "smollm2", lambda: backend)
    return backend


@torch.no_grad()
def test_reading_after_a_shared_prompt_is_reading_the_whole(small_writer):
    texts = ["the sun is up", "so", "a long walk to the sea and back again", "no"]
    model, tokenizer = small_writer.model, small_writer.tokenizer

    def last(model, states, ids):
        return float(model.lm_head(states[-1])[5])

    found = read_after("Why is it?", texts, last)
    for text, value in zip(texts, found):
        parts = [tokenizer(part, return_tensors="pt").input_ids for part in ("Why is it?", text)]
        assert float(model(torch.cat(parts, 1)).logits[0, -1, 5]) == pytest.approx(value, abs=1e-4)


@torch.no_grad()
def test_odds_of_the_text_under_each_label_are_those_of_its_tokens(small_writer):
    model, tokenizer = small_writer.model, small_writer.tokenizer
    exemplars = [TextRow("e", "good fun", "positive")]
    text = "a clever film"
    logs = []
    for label in ("positive", "negative"):
        prompt = data_generation.REVIEW_TASK.prompt(exemplars, label)[:-1]
        start, said = (tokenizer(part).input_ids for part in (prompt, f": {text}\n"))
        logits = model(torch.tensor([start + said])).logits[0].log_softmax(-1)
        # the colon is given, every later token counts
        logs.append(sum(float(logits[len(start) + i, said[i + 1]]) for i in range(len(said) - 1)))
    found = label_odds("text", exemplars, [text, "another one"])
    assert found[0] == pytest.approx(logs[0] - logs[1], abs=1e-3)


def test_an_unknown_way_to_ask_is_refused():
    with pytest.raises(UserError, match="no way 'guess'"):
        WriterScores().parameters(way="guess", seed=0)
