"Pretrained students on published sets: what they are asked, what they learn, how they are scored."

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_notes.core import UserError
from kd_notes.data.answers import unpack_bits
from kd_notes.data.examples import Example, load_split
from kd_notes.evaluation.calibration import score_labels
from kd_notes.experiments.real_students import (
    _scored_states,
    asked_example,
    has_options,
    MARK,
    option_answers,
    real_rows,
    RealStudents,
)
from kd_notes.methods.step_by_step import EXPLAIN, predict, PREDICT
from kd_notes.models.frozen_layers import states_of
from kd_notes.models.mini import load_mini_tokenizer, mini_model

ARMS = ("finetune", "finetune_2x", "dss_oracle", "shuffled_oracle")


@pytest.fixture
def student(tmp_path):
    "A folder with a small model, as a pretrained one."
    tokenizer = load_mini_tokenizer()
    folder = tmp_path / "model"
    mini_model("causal", "m", len(tokenizer), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_of(student, **given):
    settings = {"task": "nli", "arm": "dss_oracle", "n": 12, "seed": 0, "steps": 3, "lr": 1e-3}
    sizes = {"size": student, "frozen": 3, "test_rows": 6, "batch_size": 4}
    return RealStudents().parameters(**settings | sizes | given)


def test_a_word_problem_has_its_number_as_label_and_its_equation_as_reason():
    def of(equation):
        asked = asked_example(Example("a", "svamp", "Question: How many?", equation, ""))
        return asked.label, asked.rationale

    assert of("( ( 18.0 - 10.0 ) * 15.0 )") == ("120", "( ( 18 - 10 ) * 15 )")
    assert of("( 5.0 / 2.0 )") == ("2.5", "( 5 / 2 )")
    assert of("( 10.05 * 2.0 )") == ("20.1", "( 10.05 * 2 )")
    assert of("( 24691.0 / 2.0 )")[0] == "12345.5" and of("( 1.0 / 3.0 )")[0] == "0.3333"
    nli = Example("b", "nli", "Premise: a. Hypothesis: b.", "neutral", "Because.")
    asked = asked_example(nli)
    assert (asked.label, asked.rationale, asked.input) == ("neutral", "Because.", nli.input + MARK)


def test_arms_have_the_same_examples_and_labels():
    run = {"task": "nli", "n": 20, "seed": 4, "split": "pool"}
    made = {arm: real_rows(run | {"arm": arm}) for arm in ARMS}
    assert len({tuple(row.id for row in rows) for rows in made.values()}) == 1
    labels = {
        arm: [dict((t, c) for t, _, c in r.pairs)["label"] for r in rows]
        for arm, rows in made.items()
    }
    assert labels["finetune"] == labels["dss_oracle"] == labels["shuffled_oracle"]
    assert made["finetune"] == made["finetune_2x"]
    prompts = [prompt for row in made["dss_oracle"] for _, prompt, _ in row.pairs]
    assert all(p.startswith((PREDICT, EXPLAIN)) and p.endswith(MARK) for p in prompts)
    reasons = {
        arm: sorted(c for r in made[arm] for t, _, c in r.pairs if t == "rationale")
        for arm in ("dss_oracle", "shuffled_oracle")
    }
    assert reasons["dss_oracle"] == reasons["shuffled_oracle"]
    assert made["dss_oracle"] != made["shuffled_oracle"]


@pytest.mark.parametrize("task", ["nli", "svamp"])
def test_a_run_is_repeatable_and_its_metrics_agree(student, tmp_path, task):
    run = run_of(student, task=task)
    first, second = (RealStudents().train(run, tmp_path / name) for name in ("one", "two"))
    assert {k: v for k, v in first.items() if "seconds" not in k} == {
        k: v for k, v in second.items() if "seconds" not in k
    }
    bits = unpack_bits(first["outcomes"])
    assert len(bits) == 6 and first["accuracy"] == pytest.approx(sum(bits) / 6)
    assert json.loads(json.dumps(first)) == first
    if has_options(task):
        assert set(first["answers"]) <= {"entailment", "neutral", "contradiction"}


def test_frozen_layers_are_read_once_and_change_no_number(student, tmp_path):
    "The loss of the first step is that of the whole model."
    torch.manual_seed(0)
    frozen = RealStudents().train(run_of(student, steps=1), tmp_path / "frozen")
    whole = RealStudents().train(run_of(student, steps=1, frozen=0), tmp_path / "whole")
    assert frozen["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert frozen["parameters"] == whole["parameters"] and frozen["tokens"] == whole["tokens"]


def test_the_answer_is_the_most_probable_option():
    tokenizer = load_mini_tokenizer()
    model = mini_model("causal", "xs", len(tokenizer), seed=3).eval()
    cqa = Example("q", "cqa", "Question: Where? Choices: bank, pond", "bank", "", ("bank", "pond"))
    with torch.inference_mode():
        answers = option_answers(model, tokenizer, [cqa], PREDICT)
        scores = score_labels(model, tokenizer, [PREDICT + cqa.input], [["bank", "pond"]])[0]
    assert answers == {"q": scores.label}
    assert has_options("cqa") and has_options("nli") and not has_options("svamp")


def test_an_option_that_is_listed_twice_counts_once():
    tokenizer = load_mini_tokenizer()
    model = mini_model("causal", "xs", len(tokenizer), seed=3).eval()
    given = ("Question: Who drinks nothing? Choices: pioneer, abstainer, pioneer", "abstainer", "")
    cqa = Example("q", "cqa", *given, ("pioneer", "abstainer", "pioneer"))
    with torch.inference_mode():
        assert option_answers(model, tokenizer, [cqa], PREDICT)["q"] in cqa.choices


def test_students_of_a_process_share_what_the_frozen_layers_read(student, tmp_path, monkeypatch):
    first = RealStudents().train(run_of(student), tmp_path / "one")
    alone = RealStudents().train(run_of(student, seed=1), tmp_path / "two")
    _scored_states.cache_clear()
    fresh = RealStudents().train(run_of(student, seed=1), tmp_path / "three")
    assert alone["outcomes"] == fresh["outcomes"] and alone["answers"] == fresh["answers"]
    read = []
    monkeypatch.setattr(
        "kd_notes.models.frozen_layers.states_of",
        lambda body, texts: read.extend(texts) or states_of(body, texts),
    )
    again = RealStudents().train(run_of(student), tmp_path / "four")
    assert again["outcomes"] == first["outcomes"]
    # 12 rows of two tasks, and two texts that check the split
    assert 0 < len(read) == len({tuple(text) for text in read}) <= 12 * 2 + 2


def test_other_weights_in_the_same_folder_are_read_anew(student, tmp_path):
    RealStudents().train(run_of(student), tmp_path / "one")
    tokens = len(load_mini_tokenizer())
    mini_model("causal", "m", tokens, seed=7).save_pretrained(student)
    shared = RealStudents().train(run_of(student), tmp_path / "two")
    _scored_states.cache_clear()
    fresh = RealStudents().train(run_of(student), tmp_path / "three")
    assert (shared["outcomes"], shared["answers"]) == (fresh["outcomes"], fresh["answers"])


@pytest.mark.parametrize("arm", ["dss", "distill", "shuffled", "dss_teacher"])
def test_arms_that_read_a_teacher_are_refused(student, arm):
    with pytest.raises(UserError, match="reads a teacher"):
        run_of(student, arm=arm)


def test_settings_that_are_not_possible_are_said(student, tmp_path):
    with pytest.raises(UserError, match="n=2001"):
        RealStudents().train(run_of(student, n=2001), tmp_path)
    with pytest.raises(UserError, match="4 of 4 layers"):
        RealStudents().train(run_of(student, frozen=4), tmp_path)


def test_no_steps_score_the_student_as_it_comes(student, tmp_path):
    run = run_of(student, steps=0)
    given, again = (RealStudents().train(run, tmp_path / name) for name in ("one", "two"))
    assert given == again and "loss" not in given
    assert not (tmp_path / "one").exists()
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    rows = [asked_example(e) for e in load_split("nli", "test")[:6]]
    with torch.inference_mode():
        wanted = option_answers(model, load_mini_tokenizer(), rows, PREDICT)
    assert given["answers"] == list(wanted.values())[:5]
    assert given["accuracy"] == pytest.approx(sum(wanted[e.id] == e.label for e in rows) / 6)


def test_students_of_two_tasks_write_reasons_for_the_shown_rows(student, tmp_path):
    def reasons(**given):
        run = run_of(student, precision="no", **given)
        return RealStudents().train(run, tmp_path / str(len(list(tmp_path.iterdir()))))["reasons"]

    written = reasons(steps=0)
    rows = [asked_example(e) for e in load_split("nli", "test")[:5]]
    model = AutoModelForCausalLM.from_pretrained(student)
    said = predict(model, load_mini_tokenizer(), rows, prefix=EXPLAIN, max_new_tokens=40)
    assert written == [said[e.id] for e in rows] and any(written)
    assert reasons(steps=0, arm="finetune") == []
    assert len(reasons(steps=2)) == 5


def test_students_with_other_weights_do_not_share_states(tmp_path):
    "Random weights have no file: their seed tells them apart, and a cut model its layers."
    kept = []
    for given in ({"seed": 0}, {"seed": 1}, {"seed": 1, "size": "s", "frozen": 1}):
        run = run_of("m", **{"frozen": 3, "steps": 0} | given)
        kept.append(RealStudents().train(run, tmp_path / "shared"))
    _scored_states.cache_clear()
    alone = RealStudents().train(run_of("m", seed=1, steps=0), tmp_path / "alone")
    assert kept[1]["outcomes"] == alone["outcomes"] and kept[1]["reasons"] == alone["reasons"]
    assert len({(m["outcomes"], *m["answers"], *m["reasons"]) for m in kept}) == 3
