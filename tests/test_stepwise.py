"""Distilling step by step: the loss, the arms, what a student may see, and a training that is killed. Tiny models, real parts."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kd_notes.methods.step_by_step as step_by_step_module
import kd_notes.experiments.stepwise as stepwise_module
from kd_notes.core import append_jsonl, read_json, UserError, write_json
from kd_notes.data.examples import load_split
from kd_notes.data.answers import unpack_bits
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.models.pretrained import count_parameters
from kd_notes.experiments.stepwise import (
    arm_rows,
    ARMS,
    new_student,
    Stepwise,
    task_split,
)
from kd_notes.methods.step_by_step import EXPLAIN, predict, PREDICT, Row, step_rows, StepByStep
from kd_notes.training.checkpoint import last_checkpoint, save_model
from kd_notes.training.loop import train
from kd_notes.training.method import SFT
from kd_notes.training.state import TrainConfig

torch.set_num_threads(1)
TOK = load_mini_tokenizer()
POOL = load_split("nli", "pool")[:32]
STUDENTS = Stepwise()
FAMILIES = ("causal", "t5")


def student(task, arm, n, seed, **settings):
    return STUDENTS.parameters(task=task, arm=arm, n=n, seed=seed, **settings)


FIXTURES = Path(__file__).parent / "fixtures" / "real"


def tiny(family="causal", seed=0):
    return mini_model(family, "xs", len(TOK), seed)


def fit(method, rows, family="causal", steps=6, **how):
    return train(
        tiny(family),
        method,
        rows,
        TrainConfig(max_steps=steps, batch_size=8, lr=2e-3, log_every=1, device="cpu", **how),
    )


def terms(rows, family="causal", alpha=0.5, model=None):
    "(total loss, {term: mean}) of rows as one batch."
    method, model = StepByStep(TOK, family, alpha), model or tiny(family)
    batch = method.collate([method.encode(r) for r in rows])
    sums, counts = method.loss_sums(model, batch), method.token_counts(batch)
    means = {k: sums[k] / max(counts[k], 1) for k in sums}
    return sum(method.loss_weights[k] * m for k, m in means.items()), means, model


def gradient(rows, family, alpha):
    total, _, model = terms(rows, family, alpha)
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(grads, model.parameters())
        ]
    )


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    "A teacher that has answered the pool and the unlabelled split: the oracle's reasons, some labels wrong, some completions unusable."
    for split in ("pool", "unlabelled"):
        rows = [
            {
                "id": e.id,
                "label": "neutral" if i % 5 == 0 else e.label,
                "rationale": e.rationale,
                "outcome": "truncated" if i % 9 == 4 else "ok",
            }
            for i, e in enumerate(load_split("nli", split, gold=True))
        ]
        append_jsonl(tmp_path / f"{split}.jsonl", rows)
    monkeypatch.setattr(
        stepwise_module, "teacher_file", lambda task, split: tmp_path / f"{split}.jsonl"
    )
    return tmp_path


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_one_is_finetuning_on_prefixed_input_bit_for_bit(family):
    rows = step_rows([replace(e, rationale="") for e in POOL])
    ours = fit(StepByStep(TOK, family, alpha=1.0), rows, family)
    plain = fit(SFT(TOK, family), [replace(e, input=PREDICT + e.input) for e in POOL], family)
    assert [h["loss"] for h in ours.history if "loss" in h] == [
        h["loss"] for h in plain.history if "loss" in h
    ]
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True)
    )


def test_alpha_one_ignores_the_rationales_that_are_there():
    "To float tolerance: the rationale rows share the batch, and change its padding."
    ours = fit(StepByStep(TOK, alpha=1.0), step_rows(POOL), bucket=False)
    plain = fit(SFT(TOK), [replace(e, input=PREDICT + e.input) for e in POOL], bucket=False)
    losses = [[h["loss"] for h in r.history if "loss" in h] for r in (ours, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_alpha_zero_learns_the_rationale_only():
    model = fit(StepByStep(TOK, alpha=0.0), step_rows(POOL), steps=25).model
    before, after = terms(step_rows(POOL))[1], terms(step_rows(POOL), model=model)[1]
    assert after["rationale"] < 0.8 * before["rationale"]
    said = predict(model, TOK, load_split("nli", "validation")[:60])
    assert (
        sum(said[e.id] == e.label for e in load_split("nli", "validation")[:60]) <= 30
    )  # labels were never taught: at most chance
    both, alone = step_rows(POOL[:2]), [Row(r.id, r.pairs[1:]) for r in step_rows(POOL[:2])]
    torch.testing.assert_close(
        gradient(both, "causal", 0.0), gradient(alone, "causal", 0.0), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_at_one_half_is_the_mean_of_the_two(family):
    rows = step_rows(POOL[:6])
    half, label, rationale = (gradient(rows, family, a) for a in (0.5, 1.0, 0.0))
    torch.testing.assert_close(half, (label + rationale) / 2, atol=1e-6, rtol=1e-4)
    assert (
        label.norm() > 0
        and rationale.norm() > 0
        and not torch.allclose(label, rationale, atol=1e-3)
    )


def test_a_longer_rationale_leaves_the_label_term_alone():
    "Every term is a mean over its own tokens: repeating the rationales changes neither the label's value nor its share."
    short, long = (
        step_rows(POOL[:6]),
        step_rows([replace(e, rationale=" ".join([e.rationale] * 3)) for e in POOL[:6]]),
    )
    (_, a, _), (_, b, _) = terms(short), terms(long)
    torch.testing.assert_close(a["label"], b["label"], atol=1e-6, rtol=1e-5)
    seen = {}
    for name, rows in (
        ("short", short),
        ("long", long),
    ):  # the loop's own weights of the terms, in its first step
        [first] = fit(StepByStep(TOK), rows, steps=1).history
        seen[name] = first
        assert first["loss"] == pytest.approx(
            0.5 * first["label"] + 0.5 * first["rationale"], rel=1e-5
        )
    assert seen["short"]["label"] == pytest.approx(seen["long"]["label"], rel=1e-5)
    assert (
        StepByStep(TOK).token_counts(
            StepByStep(TOK).collate([StepByStep(TOK).encode(r) for r in long])
        )["rationale"]
        > 100
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_total_is_the_models_own_loss_on_each_row(family):
    "Derived a second way: Hugging Face's loss, row by row."
    rows, model = step_rows(POOL[:3]), tiny(family)
    expected = {}
    for term in ("label", "rationale"):
        total, count = 0.0, 0
        for _, source, target in [p for r in rows for p in r.pairs if p[0] == term]:
            s, t = ([*TOK.encode(x, add_special_tokens=False)] for x in (source, target))
            s, t = s + [TOK.eos_token_id] * (family == "t5"), t + [TOK.eos_token_id]
            ids, labels = (s, t) if family == "t5" else (s + t, [-100] * len(s) + t)
            total += model(
                input_ids=torch.tensor([ids]), labels=torch.tensor([labels])
            ).loss.item() * len(t)
            count += len(t)
        expected[term] = total / count
    total, means, _ = terms(rows, family, 0.3)
    assert {k: v.item() for k, v in means.items()} == pytest.approx(expected, abs=1e-4)
    assert total.item() == pytest.approx(
        0.3 * expected["label"] + 0.7 * expected["rationale"], abs=1e-4
    )


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_must_be_a_weight(alpha):
    with pytest.raises(UserError, match="alpha"):
        StepByStep(TOK, alpha=alpha)


# ---------------------------------------------------------------- arms


def test_prefixes_are_the_papers_and_the_baseline_has_none(teacher):
    pairs = arm_rows("dss", "nli", 30)[0].pairs
    assert pairs[0][1].startswith("predict: Premise:") and all(
        p[1].startswith("explain: Premise:") for p in pairs[1:]
    )
    assert arm_rows("finetune", "nli", 30)[0].pairs[0][1].startswith("Premise:")


def test_all_arms_draw_the_same_examples_and_seeds_draw_others(teacher):
    ids = {
        arm: [r.id for r in arm_rows(arm, "nli", 40, seed=3)]
        for arm in ("finetune", "dss", "shuffled", "empty", "copy", "dss_oracle", "single_task")
    }
    assert len({tuple(x) for x in ids.values()}) == 1 and len(set(ids["dss"])) == 40
    assert ids["dss"] != [r.id for r in arm_rows("dss", "nli", 40, seed=4)]


def test_shuffled_gives_everyone_the_rationale_of_somebody_else():
    marked = [replace(e, rationale=f"because of {e.id}") for e in POOL]
    for seed in range(20):
        mixed = stepwise_module.shuffled(marked, seed)
        assert all(
            a.rationale != b.rationale and (a.id, a.label) == (b.id, b.label)
            for a, b in zip(marked, mixed, strict=True)
        )
        assert sorted(e.rationale for e in mixed) == sorted(e.rationale for e in marked)


def test_what_each_arm_learns_from(teacher):
    text = {
        a: {r.id: {t: y for t, _, y in r.pairs} for r in arm_rows(a, "nli", 60)}
        for a in ARMS
        if ARMS[a].labels == "gold"
    }
    gold = {e.id: e for e in load_split("nli", "pool")}
    said = stepwise_module.teacher_text("nli", "pool")
    for i, row in text["dss"].items():
        assert row["label"] == gold[i].label and row.get("rationale", "") == said[i][1]
        assert text["dss_oracle"][i]["rationale"] == gold[i].rationale
        assert (
            text["copy"][i]["rationale"] == gold[i].input
            and not text["empty"][i]["rationale"].strip()
        )
        assert (
            text["single_task"][i]["label"].endswith(f"Answer: {gold[i].label}")
            and said[i][1] in text["single_task"][i]["label"]
        )
    assert 0 < sum("rationale" not in r for r in text["dss"].values()) < 20, (
        "unusable completions have no rationale row"
    )
    assert len(text["finetune_plus"]) == 60 + len(load_split("nli", "teacher"))


@pytest.mark.parametrize("arm", ["distill", "dss_teacher"])
def test_without_gold_labels_the_teachers_mistakes_are_learned(teacher, arm):
    said, rows = (
        stepwise_module.teacher_text("nli", "unlabelled"),
        arm_rows(arm, "nli", 200, "unlabelled"),
    )
    gold = {e.id: e.label for e in load_split("nli", "unlabelled", gold=True)}
    assert all(r.pairs[0][2] == said[r.id][0] for r in rows) and any(
        r.pairs[0][2] != gold[r.id] for r in rows
    )
    assert 150 < len(rows) < 200, "examples without a label are dropped"


@pytest.mark.parametrize(
    "args, message",
    [
        (("dsss", "nli", 5), "dsss.*finetune.*dss"),
        (("finetune", "nli", 0), "n=0"),
        (("finetune", "nli", 2001), "2001.*2000"),
        (("finetune", "nli", 5, "unlabelled"), "gold labels"),
        (("dss", "sst2", 5), "sst2"),
        (("finetune", "nli", 5, "train"), "train"),
    ],
)
def test_arm_rows_refuses(args, message):
    with pytest.raises(UserError, match=message):
        arm_rows(*args)


def test_missing_teacher_text_names_file_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(
        stepwise_module, "teacher_file", lambda task, split: tmp_path / "none.jsonl"
    )
    with pytest.raises(UserError, match=r"data/teacher/nli/pool\.jsonl.*kd-notes extract"):
        arm_rows("dss", "nli", 5)
    assert arm_rows("dss_oracle", "nli", 5), "arms that need no teacher still work"


def test_teacher_text_that_lacks_an_example(teacher):
    lines = (teacher / "pool.jsonl").read_text().splitlines()
    (teacher / "pool.jsonl").write_text("\n".join(lines[:1000]) + "\n")
    with pytest.raises(UserError, match="'nli-pool.*has no row"):
        arm_rows("dss", "nli", 2000)


def test_teacher_score_is_read_from_the_report(teacher):
    write_json(teacher / "report.json", {"test_accuracy": 0.75, "test_n": 1000})
    assert stepwise_module.teacher_score("nli") == (0.75, 1000)


def test_student_settings_are_strict():
    assert student("nli", "dss", 5, 0, size="s")["size"] == "s"
    with pytest.raises(UserError, match="sizee"):
        student("nli", "dss", 5, 0, sizee="s")


# ---------------------------------------------------------------- predictions


@pytest.mark.parametrize("family", FAMILIES)
def test_predict_reads_the_input_only_and_no_neighbours(family):
    "Neither rationale, label nor the rest of the batch may change what is said."
    model, few = tiny(family), POOL[:6]
    whole = predict(model, TOK, few, family=family, max_new_tokens=6)
    blind = [replace(e, rationale="", label="entailment") for e in few]
    assert predict(model, TOK, blind, family=family, max_new_tokens=6) == whole
    assert predict(model, TOK, few[::-1], family=family, max_new_tokens=6, batch_size=1) == whole
    assert (
        len(whole) == 6
        and predict(model, TOK, few, prefix=EXPLAIN, family=family, max_new_tokens=6).keys()
        == whole.keys()
    )


def test_a_student_learns_what_it_is_trained_on():
    "Sixteen examples by heart: a wrong prefix, mask or target position in training or in prediction would show."
    few = POOL[:16]
    model = train(
        tiny(),
        StepByStep(TOK),
        step_rows(few),
        TrainConfig(max_steps=60, batch_size=16, lr=8e-3, device="cpu"),
    ).model
    said = predict(model, TOK, few)
    assert sum(said[e.id] == e.label for e in few) >= 14


# ---------------------------------------------------------------- a training as a run


def params(**changes):
    return student("nli", "dss_oracle", 48, 0, steps=4, score_on="validation", **changes)


def numbers(metrics):
    return {k: v for k, v in metrics.items() if "seconds" not in k}


@pytest.mark.parametrize("family", FAMILIES)
def test_train_student_gives_metrics_that_agree_with_each_other(tmp_path, family):
    made = STUDENTS.train(params(family=family), tmp_path)
    bits = unpack_bits(made["outcomes"])
    assert (
        len(bits) == 500
        and made["accuracy"] == pytest.approx(sum(bits) / 500)
        and made["examples"] == 48
    )
    assert (
        made["tokens"] > 0 and made["parameters"] > 100_000 and json.loads(json.dumps(made)) == made
    )


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    from kd_notes.core import read_json
    from kd_notes.experiments import stepwise
    from kd_notes.training.state import Callback
    class Plug(Callback):
        def on_step(self, loop):
            if loop.step == 4: os.kill(os.getpid(), signal.SIGKILL)
    real, config = stepwise.train, stepwise.TrainConfig
    stepwise.TrainConfig = lambda **how: config(**(how | {"save_every": 2}))
    stepwise.train = lambda *args, **how: real(*args, **how, callbacks=[Plug()])
    stepwise.Stepwise().train(read_json(Path(sys.argv[1])/"asked.json"), Path(sys.argv[1])/"run")
"""


def test_resume_after_a_kill_gives_the_same_metrics(tmp_path, monkeypatch):
    p = params() | {"steps": 7}
    write_json(tmp_path / "asked.json", p)
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    config = stepwise_module.TrainConfig
    monkeypatch.setattr(
        stepwise_module, "TrainConfig", lambda **how: config(**(how | {"save_every": 2}))
    )
    started, real = [], stepwise_module.train
    monkeypatch.setattr(
        stepwise_module,
        "train",
        lambda *a, **how: started.append(last_checkpoint(how["run_dir"])) or real(*a, **how),
    )
    resumed, whole = STUDENTS.train(p, tmp_path / "run"), STUDENTS.train(p, tmp_path / "whole")
    assert started[0] is not None and started[1] is None, (
        "the first one has gone on from a checkpoint"
    )
    assert numbers(resumed) == numbers(whole) and read_json(tmp_path / "asked.json") == p


def test_the_empty_control_learns_the_end_token_and_nothing_else():
    tok = load_mini_tokenizer()
    row = arm_rows("empty", "nli", 3)[0]
    by_term = {term: target for term, _, target in StepByStep(tok).encode(row)}
    assert by_term["rationale"] == [tok.eos_token_id]


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory):
    "A T5 with random weights and its tokenizer, as `save_pretrained` leaves it."
    folder = tmp_path_factory.mktemp("t5") / "tiny"
    tok = load_mini_tokenizer()
    save_model(mini_model("t5", "xs", len(tok), seed=0), folder, tok)
    return folder


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_pretrained_t5_learns_from_a_published_set(tiny_t5, precision, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_DATA", str(FIXTURES))
    params = student(
        "cqa@folder",
        "dss_oracle",
        4,
        0,
        family="t5",
        size=str(tiny_t5),
        steps=3,
        lr=1e-3,
        precision=precision,
    )
    metrics = STUDENTS.train(params, tmp_path)
    assert (
        metrics["parameters"] == count_parameters(mini_model("t5", "xs", 2048, seed=0))
        and metrics["tokens"] > 0
    )
    assert len(unpack_bits(metrics["outcomes"])) == len(task_split("cqa@folder", "test"))


def test_the_recipe_of_profile_gpu_on_ten_rows(tiny_t5, tmp_path, monkeypatch):
    "A teacher writes for a published set, some of it only; its line is known; T5 students of all arms learn from the same examples."
    from kd_notes.experiments.extraction import extract_rationales

    monkeypatch.setenv("KD_NOTES_DATA", str(FIXTURES))
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "cache"))
    save_model(mini_model("causal", "xs", len(TOK), seed=0), tmp_path / "teacher", TOK)
    assert stepwise_module.teacher_scores(["cqa@folder"]) == {}
    made = extract_rationales(
        "cqa@folder",
        split="pool",
        teacher=str(tmp_path / "teacher"),
        shots=1,
        limit=6,
        max_new_tokens=8,
    )
    assert made["rows"] == 6 and Path(made["file"]) == stepwise_module.teacher_file(
        "cqa@folder", "pool"
    )
    extract_rationales(
        "cqa@folder", split="test", teacher=str(tmp_path / "teacher"), shots=1, max_new_tokens=8
    )
    assert (
        stepwise_module.teacher_scores(["cqa@folder"]).keys() == {"cqa@folder"}
        and stepwise_module.teacher_score("cqa@folder")[1] == 10
    )
    drawn = {
        arm: [r.id for r in arm_rows(arm, "cqa@folder", 5)]
        for arm in ("finetune", "dss", "shuffled")
    }
    assert len(set(map(tuple, drawn.values()))) == 1
    size = {"family": "t5", "size": str(tiny_t5), "steps": 2, "lr": 1e-3, "batch_size": 2}
    runs = [student("cqa@folder", arm, 5, 0, **size) for arm in drawn]
    assert all(0 <= r["metrics"]["accuracy"] <= 1 for r in STUDENTS.results(runs))
    folder = next((tmp_path / "cache" / "runs" / "stepwise").iterdir())
    assert {k: read_json(folder / "manifest.json")[k] for k in ("dtype", "effective_batch")} == {
        "dtype": "float32",
        "effective_batch": 2,
    }


def test_other_weights_at_the_same_path_are_another_student(tiny_t5):
    before = STUDENTS.inputs(student("nli", "dss", 10, 0, size=str(tiny_t5)))
    weights = tiny_t5 / "model.safetensors"
    kept = weights.read_bytes()
    try:
        save_model(mini_model("t5", "xs", len(TOK), seed=9), tiny_t5, TOK)
        assert STUDENTS.inputs(student("nli", "dss", 10, 0, size=str(tiny_t5))) != before
    finally:
        weights.write_bytes(kept)


def test_a_published_sets_unlabelled_inputs_tell_nothing(monkeypatch):
    monkeypatch.setenv("KD_NOTES_DATA", str(FIXTURES))
    for task in ("cqa@folder", "asdiv@folder"):
        found = task_split(task, "unlabelled")
        assert found and not any(e.label or e.rationale for e in found)


def test_several_samples_of_a_teacher_vote(tmp_path, monkeypatch):
    rows = [
        {"id": "a", "sample": i, "label": label, "rationale": f"because {i}", "outcome": "ok"}
        for i, label in enumerate(["entailment", "neutral", "entailment"])
    ]
    append_jsonl(tmp_path / "pool.jsonl", rows)
    monkeypatch.setattr(
        stepwise_module, "teacher_file", lambda task, split: tmp_path / f"{split}.jsonl"
    )
    assert stepwise_module.teacher_text("nli", "pool") == {"a": ("entailment", "because 0")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padding_token_in_a_text_is_text(family):
    model = tiny(family, seed=3).eval()
    odd, long = (
        replace(POOL[0], id="odd", input="a <pad> duck <pad>"),
        replace(POOL[1], id="long", input="a dog runs " * 9),
    )
    ids = TOK.encode(step_by_step_module.PREDICT + odd.input, add_special_tokens=False) + [
        TOK.eos_token_id
    ] * (family == "t5")
    assert TOK.pad_token_id in ids
    rows = torch.tensor([ids])
    made = model.generate(
        input_ids=rows,
        attention_mask=torch.ones_like(rows),
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=TOK.pad_token_id,
        eos_token_id=TOK.eos_token_id,
    )[0, 0 if family == "t5" else len(ids) :]
    alone = TOK.decode(made, skip_special_tokens=True).strip()
    assert predict(model, TOK, [odd, long], family=family, max_new_tokens=8)["odd"] == alone != ""


def test_an_input_beyond_the_context_is_named():
    long = replace(POOL[0], id="endless", input="a duck " * 600)
    with pytest.raises(UserError, match="endless"):
        predict(tiny(), TOK, [POOL[1], long])
    with pytest.raises(UserError, match="endless"):
        train(
            tiny(),
            StepByStep(TOK),
            step_rows([long]),
            TrainConfig(
                max_steps=1, batch_size=1, lr=1e-3, max_length=stepwise_module.context_of(tiny())
            ),
        )


def test_unknown_arms_and_splits_are_named_before_anything_is_trained():
    for wrong in (("dsss", {}), ("dss", {"score_on": "tset"})):
        with pytest.raises(UserError):
            student("nli", wrong[0], 10, 0, **wrong[1])


def test_a_batch_without_any_rationale_teaches_the_labels():
    rows = step_rows([replace(e, rationale="") for e in POOL[:8]] + POOL[8:10])
    assert all(math.isfinite(r["loss"]) for r in fit(StepByStep(TOK), rows, steps=4).history)


def test_a_pretrained_student_of_the_other_family_is_refused(tiny_t5):
    with pytest.raises(UserError, match="not of the family 'causal'"):
        new_student(student("nli", "dss", 10, 0, size=str(tiny_t5)))
    with pytest.raises(UserError, match="xs"):
        new_student(student("nli", "dss", 10, 0, size="xxl"))


def test_what_is_not_changed_is_not_in_the_parameters():
    assert student("nli", "dss", 10, 0) == student("nli", "dss", 10, 0, precision="no", layers=0)
    assert "precision" in student("nli", "dss", 10, 0, precision="bf16")


def test_rates_of_the_grid_are_for_the_students_that_were_in_it(tiny_t5, tmp_path, monkeypatch):
    chosen = {
        "lr": {"nli/dss": 0.003, "nli/finetune": 0.006, "nli/dss/t5": 0.012},
        "default": 0.001,
    }
    write_json(tmp_path / "chosen" / "stepwise.json", chosen)
    monkeypatch.setattr(stepwise_module, "data_dir", lambda: tmp_path)
    assert student("nli", "dss", 4, 0)["lr"] == student("nli", "empty", 4, 0)["lr"] == 0.003
    assert (
        student("nli", "dss", 4, 0, family="t5")["lr"]
        == student("nli", "copy", 4, 0, family="t5")["lr"]
        == 0.012
    )
    assert (
        student("nli", "distill", 4, 0, family="t5")["lr"] == 0.006
    )  # not in the grid of T5: the causal student's
    assert student("cqa", "dss", 4, 0)["lr"] == 0.001
    assert (
        student("nli", "dss", 4, 0, family="t5", size=str(tiny_t5))["lr"] == 5e-5
    )  # a rate for random weights would ruin a pretrained model
