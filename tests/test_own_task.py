"A task of one's own: its file, extraction, a step-by-step student, predictions and scores. Tiny models, real processes, real kills."

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import start_script, TOML
from typer.testing import CliRunner

from kd_notes.cli import app
from kd_notes.core import read_json, read_jsonl, UserError
from kd_notes.data.examples import Example, TaskInfo
from kd_notes.data.task_file import OwnTask, read_task, task_examples
from kd_notes.evaluation.task_scores import macro_f1, read_answer, score_difference, task_score
from kd_notes.experiments.extraction import extract_rationales, own_question
from kd_notes.generation.completions import Completion, prompt_hash
from kd_notes.methods.rationale_filters import select
from kd_notes.methods.rationales import extraction_row, with_rationales
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.products.predict import evaluate_rows, predict_rows
from kd_notes.products.stepwise import stepwise
from kd_notes.products.stepwise_plan import learnt_rows, prepare_rows, stepwise_settings
from kd_notes.products.stepwise_request import StepwiseRequest
from kd_notes.products.stepwise_trials import run_search, Search
from kd_notes.training.checkpoint import save_model

WORDS = {"red": "brick", "green": "leaf"}


def rows(n: int = 48) -> list[dict]:
    colours = ["red", "green"]
    return [
        {"id": f"r{i}", "thing": f"{WORDS[colours[i % 2]]} number {i}", "colour": colours[i % 2]}
        for i in range(n)
    ]


def write_rows(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture
def place(tmp_path):
    "A folder with a task file, rows, and a teacher's answers to replay; r3 is cut, r5 is wrong, r7 is no colour."
    (tmp_path / "task.toml").write_text(TOML)
    write_rows(tmp_path / "rows.jsonl", rows())
    task, examples, prompt = own_question(
        read_task(tmp_path / "task.toml"), tmp_path / "rows.jsonl", "replay:x", None, 0
    )
    answers = []
    for example in examples:
        label = {"r5": "red", "r7": "blue"}.get(example.id, example.label)
        answers.append(
            {
                "id": example.id,
                "text": f" A {example.input.split()[1]} is {label}.\nAnswer: {label}",
                "finish": "stop",
                "prompt_hash": prompt_hash(prompt(example)),
            }
        )
    answers[1]["text"] = ""
    answers[3] |= {"text": " It is", "finish": "length"}
    write_rows(tmp_path / "answers.jsonl", answers)
    return tmp_path


def extract(place, out="rationales.jsonl", **more):
    return extract_rationales(
        place / "task.toml",
        place / out,
        source=place / "rows.jsonl",
        teacher=f"replay:{place / 'answers.jsonl'}",
        **more,
    )


# --- the task file ----------------------------------------------------------------------------------------------------------------


def test_a_task_file_becomes_a_task(place):
    task = read_task(place / "task.toml")
    assert (task.labels, task.metric, task.scored_by) == (("red", "green"), "exact", "accuracy")
    assert [(s.input, s.label) for s in task.solved] == [
        ("Thing: a ripe cherry", "red"),
        ("Thing: a blade of grass", "green"),
    ]


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("template =", "templat =", ["'templat' is not known", "Did you mean 'template'"]),
        ('name = "colours"\n', "", ["'name' is missing"]),
        ('labels = ["red", "green"]\n', "", ["'labels' is missing"]),
        ('["red", "green"]', "[1, 2]", ["the label 1 is not text"]),
        ('["red", "green"]', '["red", "Red"]', ["occurs twice"]),
        ('["red", "green"]', '["red"]', ["only one label"]),
        ('["red", "green"]', '"numbr"', ["'numbr' is not known", "Did you mean 'number'"]),
        ('colour = "green"', 'colour = "blue"', ["'blue' is not one of red, green", "example 2"]),
        ('rationale = "Grass is green."', "", ["rationale is missing", "example 2"]),
        ('rationale = "G', 'rational = "G', ["'rational' is not known", "'rationale'"]),
        ('thing = "a blade', 'thin = "a blade', ["'thin' is not known", "'thing'"]),
        ('name = "colours"', "name = 3", ["name should be text, not 3"]),
        ('instruction = "Which', 'instruction = ["Which"] # "', ["instruction should be text"]),
        ("{thing}", "{thing", ["template: it cannot be read"]),
        ("{thing}", "{thing.x!r}", ["is not the name of a field"]),
        ("{thing}", "thing", ["shows no field of a row"]),
        ("{thing}", "{thing} {colour}", ["template: it shows the field 'colour'", "the answer"]),
        ("{thing}", "{thing} {rationale}", ["template: it shows the field 'rationale'"]),
        ('"accuracy"', '"acuracy"', ["'acuracy' is not known", "Did you mean 'accuracy'"]),
        ('"accuracy"', '"rouge_l"', ["rouge_l does not fit the labels"]),
        ('"accuracy"', '"numeric_match"', ["numeric_match does not fit"]),
        ('name = "colours"', 'name = "nli"', ["'nli' belongs to a task of the book"]),
        ('name = "colours"', "name = colours", ["not valid TOML"]),
    ],
)
def test_each_fault_of_a_task_file_has_its_sentence(place, old, new, said):
    file = place / "task.toml"
    assert old in TOML
    file.write_text(TOML.replace(old, new))
    with pytest.raises(UserError) as error:
        read_task(file)
    assert "task.toml" in str(error.value)
    assert all(text in str(error.value) for text in said), str(error.value)


def test_a_file_that_is_none_has_its_sentence(tmp_path):
    (tmp_path / "latin.toml").write_bytes('name = "Öl"'.encode("latin-1"))
    for name, said in (("latin.toml", "not UTF-8"), ("none.toml", "cannot be read"), ("", "read")):
        with pytest.raises(UserError, match=said):
            read_task(tmp_path / name)
    with pytest.raises(UserError, match="no task 'sentiment'.*task.toml"):
        task_examples("sentiment", [{"input": "a"}])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"thing": None}, "shows the field 'thing', which the row lacks"),
        ({"thing": {"a": 1}}, "the field 'thing' is a dict"),
        ({"thing": "half \ud83d"}, "half a character"),
        ({"colour": "blue"}, "'blue' is not one of"),
        ({"colour": ["red", "green"]}, "holds 2 labels"),
        ({"id": "r1"}, "'r1' was already used at .*rows.jsonl:2"),
    ],
)
def test_each_fault_of_a_row_names_file_and_line(place, change, said):
    items = rows(4)
    items[2] |= change
    write_rows(place / "rows.jsonl", items)
    with pytest.raises(UserError, match=said) as error:
        task_examples(place / "task.toml", place / "rows.jsonl")
    assert error.value.where.endswith("rows.jsonl:3")


def test_fields_of_any_kind_become_text():
    task = OwnTask("sums", "Sums", metric="equation", template="{a} and {flag} of {{{items}}}")
    row = {"a": 1e-05, "flag": True, "items": ["x", 2], "label": 3}
    (example,) = task_examples(task, [row])
    assert (example.input, example.label) == ("0.00001 and true of {x, 2}", "3")
    assert task_examples(task, [row | {"label": "$1,234.50"}])[0].label == "1234.50"


def test_choices_belong_to_the_row():
    task = OwnTask("pick", "Pick", choices=True, template="{question} ({choices})")
    row = {"question": "Which?", "choices": ["a b", "c"], "label": "c"}
    (example,) = task_examples(task, [row])
    assert example.input == "Which? (a b, c)" and example.choices == ("a b", "c")
    assert read_answer(task, example, "A B.") == ("a b", "ok")
    with pytest.raises(UserError, match="not among the choices"):
        task_examples(task, [row | {"label": "d"}])
    with pytest.raises(UserError, match="no choices"):
        task_examples(task, [{"question": "Which?", "label": "c"}])


def test_a_plain_task_info_will_do():
    info = TaskInfo("plain", "Plain", labels=("yes", "no"))
    assert task_examples(info, [{"input": "a", "label": "yes"}])[0].task == "plain"


@pytest.mark.parametrize("limit", [0, -1])
def test_a_count_that_is_none_drops_no_row(place, limit):
    with pytest.raises(UserError, match="number of rows|whole number from 1"):
        extract(place, limit=limit)
    with pytest.raises(UserError, match="number of rows|whole number from 1"):
        task_examples(place / "task.toml", place / "rows.jsonl", limit)


# --- scores -----------------------------------------------------------------------------------------------------------------------


def test_macro_f1_is_that_of_scikit_learn_and_its_interval_covers_it():
    from sklearn.metrics import f1_score

    task = OwnTask("abc", "ABC", labels=("a", "b", "c"), score="macro_f1")
    draw = np.random.default_rng(0)
    gold = draw.choice(["a", "b", "c"], 200, p=[0.7, 0.2, 0.1])
    said = np.where(draw.random(200) < 0.7, gold, "a")
    examples = task_examples(task, [{"input": f"{i}", "label": g} for i, g in enumerate(gold)])
    answers = {example.id: str(label) for example, label in zip(examples, said)}
    assert macro_f1(answers, examples)[0] == pytest.approx(f1_score(gold, said, average="macro"))
    score = task_score(task, answers, examples)
    assert score["low"] < score["value"] < score["high"] and score["high"] - score["low"] < 0.3
    perfect = {example.id: example.label for example in examples}
    gap = score_difference(task, perfect, answers, examples)
    assert gap["value"] == pytest.approx(1 - score["value"]) and gap["low"] > 0


def test_numbers_and_texts_are_scored_by_value_and_by_words():
    numbers = OwnTask("n", "N", metric="equation")
    examples = task_examples(numbers, [{"input": f"{i}", "label": 42} for i in range(3)])
    said = [read_answer(numbers, e, t) for e, t in zip(examples, ("$42.00", "40 + 2", "many"))]
    assert [outcome for _, outcome in said] == ["ok", "ok", "not_allowed"]
    answers = {example.id: label for example, (label, _) in zip(examples, said)}
    score = task_score(numbers, answers, examples)
    assert score["value"] == pytest.approx(2 / 3) and score["answered"] == 2
    texts = OwnTask("t", "T", score="rouge_l")
    (example,) = task_examples(texts, [{"input": "x", "label": "one two three four"}])
    assert task_score(texts, {example.id: "one two five six"}, [example])["value"] == 0.5


def test_a_label_of_two_lines_can_be_met():
    task = OwnTask("free", "Free")
    (example,) = task_examples(task, [{"input": "x", "label": "one\n two"}])
    label, _ = read_answer(task, example, "one two\n")
    assert task_score(task, {example.id: label}, [example])["value"] == 1


MARKED = (
    "#winter",
    "C#",
    "$5",
    'a "yes"',
    r"\frac{1}{2}",
    "[0, 1]",
    "*args",
    "<b>",
    "{a}",
    "snake_case_",
)


@pytest.mark.parametrize("gold", [*MARKED, "#", "**", "$", "`x` and *y*"])
def test_an_open_answer_word_for_word_is_right_whatever_marks_it_has(tmp_path, gold):
    task = OwnTask("free", "Free")
    (example,) = examples = task_examples(task, [{"input": "x", "label": gold}])
    label, outcome = read_answer(task, example, f"{gold}\n")
    assert outcome == "ok" and task_score(task, {example.id: label}, examples)["value"] == 1
    assert task_score(task, {example.id: "autumn"}, examples)["value"] == 0


@pytest.mark.parametrize("gold", [gold for gold in MARKED if gold != "<b>"])  # read as markup
@pytest.mark.parametrize("stream", [False, True])
def test_a_teachers_open_answer_word_for_word_is_right(tmp_path, gold, stream):
    (tmp_path / "free.toml").write_text('name = "free"\nlabels = "text"\n')
    data = write_rows(tmp_path / "rows.jsonl", [{"id": "a", "input": "x", "label": gold}])
    task, (example,), prompt = own_question(
        read_task(tmp_path / "free.toml"), data, "replay:x", None, 0
    )
    answer = {"id": "a", "text": f" So.\nAnswer: {gold}", "finish": "stop"}
    answer["prompt_hash"] = prompt_hash(prompt(example))
    teacher = f"replay:{write_rows(tmp_path / 'answers.jsonl', [answer])}"
    how = {"source": data, "teacher": teacher, "stream": stream}
    out = tmp_path / "out.jsonl"
    assert extract_rationales(tmp_path / "free.toml", out, **how)["accuracy"] == 1
    kept, report = select([example], read_jsonl(out))
    assert len(kept) == 1 and report["yield"] == 1


# --- extraction -------------------------------------------------------------------------------------------------------------------


def test_a_teacher_writes_for_a_task_file_as_for_an_embedded_task(place):
    made = extract(place)
    assert made["outcomes"] == {
        "ok": 45,
        "no_rationale": 1,
        "truncated": 1,
        "label_not_allowed": 1,
    }
    score = made["score"]
    assert score["n"] == 48 and score["answered"] == 45
    assert score["value"] == pytest.approx(44 / 48)
    manifest = read_json(place / "rationales.manifest.json")
    assert manifest["prompt"]["header"].startswith("Which colour has the thing? Reason in")
    assert len(manifest["prompt"]["shots"]) == 2


def test_an_interrupted_extraction_goes_on(place):
    whole = extract(place)
    text = (place / "rationales.jsonl").read_bytes()
    (place / "rationales.jsonl").write_bytes(text[: len(text) // 2])  # in the middle of a row
    assert extract(place) == whole
    again = {row["id"]: row["text"] for row in read_jsonl(place / "rationales.jsonl")}
    assert again == {row["id"]: row["text"] for row in read_jsonl(place / "answers.jsonl")}
    (place / "task.toml").write_text(TOML.replace("Thing: ", "Object: "))
    with pytest.raises(UserError, match="another job|has changed"):
        extract(place)


def test_a_local_model_is_a_teacher_too(place):
    tok = load_mini_tokenizer()
    save_model(mini_model("causal", "xxs", len(tok), seed=1), place / "teacher", tok)
    done = CliRunner().invoke(
        app,
        [
            *("extract", "--task", str(place / "task.toml"), "--input", str(place / "rows.jsonl")),
            *("--teacher", str(place / "teacher"), "--out", str(place / "mini.jsonl")),
            *("--limit", "3", "--max-new-tokens", "4"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert len(read_jsonl(place / "mini.jsonl")) == 3


# --- what is learnt ---------------------------------------------------------------------------------------------------------------

QUICK = {
    "validation": 8.0,
    "test": 8.0,
    "max_steps": 30,
    "batch_size": 8,
    "learning_rates": [1e-2],
    "evaluations": 3,
    "device": "cpu",
}


def prepared(place, **more):
    task = read_task(place / "task.toml")
    settings = stepwise_settings(**QUICK | more)
    examples = task_examples(task, place / "rows.jsonl")
    return task, prepare_rows(task, examples, place / "rationales.jsonl", settings), settings


def test_arms_learn_from_the_same_rows(place):
    extract(place)
    task, splits, settings = prepared(place)
    both = learnt_rows("step_by_step", task, splits, settings)
    plain = learnt_rows("finetuning", task, splits, settings)
    assert [row.id for row in both] == [row.id for row in plain] == [e.id for e in splits.train]
    held = {e.id for e in splits.validation + splits.test}
    assert len(held) == 16 and not held & {row.id for row in both}
    unusable = {"r1", "r3", "r7"}
    assert {row.id for row in both if len(row.pairs) == 1} == unusable & {row.id for row in both}
    given = learnt_rows("distillation", task, splits, settings)
    assert {row.id for row in given} == {row.id for row in both} - unusable
    if "r5" in {row.id for row in given}:
        assert next(row for row in given if row.id == "r5").pairs[0][2] == "red"  # the teacher's


def test_only_agreeing_rationales_if_asked(place):
    extract(place)
    task, splits, settings = prepared(place, agreeing=True, validation=1.0, test=1.0, seed=1)
    taught = {row.id: row for row in learnt_rows("step_by_step", task, splits, settings)}
    assert "r5" in taught and len(taught["r5"].pairs) == 1


def test_rows_without_labels_are_learnt_with_the_teachers(place):
    items = rows()
    for item in items[:20]:
        del item["colour"]
    write_rows(place / "rows.jsonl", items)
    extract(place)
    task, splits, settings = prepared(place)
    assert all(example.label for example in splits.validation + splits.test)
    both = {row.id: row for row in learnt_rows("step_by_step", task, splits, settings)}
    assert both["r0"].pairs[0][2] == "red" and "r1" not in both  # r1: no label at all
    with pytest.raises(UserError, match="20 training rows have no label"):
        learnt_rows("finetuning", task, splits, settings)


def test_an_input_is_never_on_two_sides(place):
    items = [row | {"thing": row["thing"].split()[0] + str(i % 12)} for i, row in enumerate(rows())]
    write_rows(place / "rows.jsonl", items)
    task = read_task(place / "task.toml")
    settings = stepwise_settings(validation=3.0, test=3.0)
    splits = prepare_rows(task, task_examples(task, items), None, settings)
    sides = [{e.input for e in side} for side in (splits.train, splits.validation, splits.test)]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    test = task_examples(task, [items[0] | {"id": "other"}])
    splits = prepare_rows(task, task_examples(task, items), None, settings, test)
    assert test[0].input not in {e.input for e in splits.train + splits.validation}
    assert splits.left_out == {"same input as a test row": 4}


def test_equal_inputs_are_known_whatever_their_white_space(place):
    blanks = (" ", "  ", "\n")
    items = [{"thing": f"brick{b}{i}", "colour": "red"} for i in range(12) for b in blanks]
    task = read_task(place / "task.toml")
    splits = prepare_rows(task, task_examples(task, items), None, stepwise_settings())
    sides = (splits.train, splits.validation, splits.test)
    first, second, third = ({"".join(e.input.split()) for e in side} for side in sides)
    assert first and second and third and not (first & second or first & third or second & third)


# --- which answer belongs to which row --------------------------------------------------------------------------------------------


def two_files(place, **more):
    "A task, training rows and rows of a test file with the same ids and other inputs."
    task = read_task(place / "task.toml")
    things = [{"id": i, "thing": f"thing {i}", "colour": "red"} | more for i in range(12)]
    tests = [row | {"thing": f"test {row['id']}", "colour": "green"} for row in things[:4]]
    return task, task_examples(task, things), task_examples(task, tests)


def test_reasons_of_test_rows_are_not_learnt_by_training_rows_of_the_same_id(place):
    task, train, test = two_files(place)
    train = [replace(e, rationale=f"why {e.input}") for e in train]
    test = [replace(e, rationale="of the test") for e in test]
    settings = stepwise_settings(validation=2.0)
    splits = prepare_rows(task, train, None, settings, test)
    for row in learnt_rows("step_by_step", task, splits, settings):
        (_, asked, _), (_, _, reason) = row.pairs
        assert reason == f"why {asked.removeprefix('predict: ')}"


@pytest.mark.parametrize("hashed", [True, False])
def test_a_teacher_has_a_score_only_where_it_was_asked(place, hashed):
    task, train, test = two_files(place)

    def answered(examples, label):
        keys = {"input_hash": prompt_hash} if hashed else {}
        return [
            {"id": e.id, "rationale": "so", "label": label}
            | {name: make(e.input) for name, make in keys.items()}
            for e in examples
        ]

    file = write_rows(place / "r.jsonl", answered(train, "red"))
    settings = stepwise_settings(validation=2.0)
    splits = prepare_rows(task, train, file, settings, test)
    assert len(splits.teacher) == 12 and not splits.tested
    if hashed:
        write_rows(file, answered(train, "red") + answered(test, "green"))
        splits = prepare_rows(task, train, file, settings, test)
        assert {a.label for a in splits.teacher.values()} == {"red"}
        assert {a.label for a in splits.tested.values()} == {"green"} and len(splits.tested) == 4
    named = [replace(e, id=f"t{e.id}") for e in test]
    write_rows(file, answered(train, "red") + answered(named, "green"))
    assert len(prepare_rows(task, train, file, settings, named).tested) == 4


def test_answers_to_other_inputs_are_refused(place):
    "Rows without ids are numbered: one that is deleted must not move the reasons of the others."
    bare = [{name: row[name] for name in ("thing", "colour")} for row in rows()]
    write_rows(place / "rows.jsonl", bare)
    task, examples, prompt = own_question(
        read_task(place / "task.toml"), place / "rows.jsonl", "replay:x", None, 0
    )
    said = [(e, f" It is {e.input}.\nAnswer: {e.label}\n\n") for e in examples]
    done = [Completion(e.id, text, 1, 1, "stop", 0.0) for e, text in said]
    made = [extraction_row(e, c, prompt(e)) for e, c in zip(examples, done)]
    write_rows(place / "rationales.jsonl", made)
    prepared(place)
    with pytest.raises(UserError, match="'rows-1' is not the one"):
        with_rationales(examples[1:2], [made[0] | {"id": examples[1].id}])
    write_rows(place / "rows.jsonl", bare[1:])
    with pytest.raises(UserError, match="rationales.jsonl:1: the input of 'rows-0' is not the one"):
        prepared(place)
    old = [{name: row[name] for name in row if name != "input_hash"} for row in made]
    write_rows(place / "rationales.jsonl", old)
    with pytest.warns(UserWarning, match="47 rows .* joined by id alone"):
        prepared(place)


def test_labels_of_rationales_are_read_as_answers_are(place):
    settings = stepwise_settings(validation=2.0, test=2.0)
    task = OwnTask("own", "Own", labels=("0", "1"))
    items = [{"id": i, "input": f"row {i}"} for i in range(30)]
    labelled = [row | {"label": i % 2} if i < 10 else row for i, row in enumerate(items)]
    examples = task_examples(task, labelled)

    def learnt(labels):
        said = [{"id": f"{i}", "rationale": "so", "label": labels[i % 2]} for i in range(30)]
        file = write_rows(place / "r.jsonl", said)
        splits = prepare_rows(task, examples, file, settings)
        made = learnt_rows("step_by_step", task, splits, settings)
        return Counter(row.pairs[0][2] for row in made), splits.left_out

    for labels in ([0, 1], ["0.", "**1**"], [" 0", "the answer is 1"]):
        found, left_out = learnt(labels)
        assert set(found) == {"0", "1"} and found.total() == 26 and not left_out
    found, left_out = learnt([0, "yes"])
    assert sum(found.values()) == 16 and sum(left_out.values()) == 10
    with pytest.raises(UserError, match="r.jsonl:1.*'label'"):
        learnt([{}, 1])
    number = OwnTask("num", "Number", metric="equation")
    file = write_rows(place / "r.jsonl", [{"id": f"{i}", "rationale": "so"} for i in range(30)])
    prepare_rows(number, task_examples(number, labelled), file, settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": 3},
        {"alpha": "half"},
        {"alpha": 1.5},
        {"max_steps": True},
        {"n": -1},
        {"arms": ["dss"]},
        {"arms": []},
        {"learning_rates": [0.0]},
        {"validation": 0.0},
        {"device": 3},
    ],
)
def test_a_wrong_setting_is_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        stepwise_settings(**wrong)


# --- the student ------------------------------------------------------------------------------------------------------------------


def train_student(place, out, **more):
    return stepwise(
        place / "task.toml",
        place / "rows.jsonl",
        place / "rationales.jsonl",
        more.pop("student", "mini:xxs"),
        place / out,
        **QUICK | more,
    )


@pytest.mark.parametrize("student", ["mini:xxs", "mini-t5"])
def test_two_commands_make_a_student_that_answers(place, student):
    extract(place)
    arms = ["step_by_step", "finetuning", "distillation"]
    report = train_student(place, "out", student=student, arms=arms, max_steps=60)
    out = place / "out"
    assert set(report["arms"]) == set(arms) and set(report["differences"]) == set(arms[1:])
    assert report["arms"]["step_by_step"]["test"]["value"] >= 0.8
    files = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "README.md", "scores.json", "curve.png", "curve.csv"} <= files
    assert {"examples.jsonl", "student.json", "report.json"} <= files and "work" not in files
    assert (out / "compared" / "finetuning" / "model.safetensors").is_file()
    assert str(place) not in (out / "report.json").read_text() + (out / "README.md").read_text()
    shown = read_jsonl(out / "examples.jsonl")
    assert len(shown) == 8 and set(shown[0]["answers"]) == set(arms)
    asked = [row for row in rows() if row["id"] in {example["id"] for example in shown}]
    score = evaluate_rows(out, asked, place / "scores.json")
    assert score["value"] == report["arms"]["step_by_step"]["test"]["value"]
    predict_rows(out, asked, place / "said.jsonl")
    said = {row["id"]: row["text"] for row in read_jsonl(place / "said.jsonl")}
    assert said == {example["id"]: example["answers"]["step_by_step"] for example in shown}
    assert train_student(place, "out", student=student, arms=arms, max_steps=60) == report


def test_another_request_is_refused(place):
    extract(place)
    train_student(place, "out")
    with pytest.raises(UserError, match="another alpha"):
        train_student(place, "out", alpha=0.9)
    with pytest.raises(UserError, match="another student"):
        train_student(place, "out", student="mini")
    lines = (place / "rationales.jsonl").read_text().splitlines(keepends=True)
    (place / "rationales.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="another rationales"):
        train_student(place, "out")
    (place / "other").mkdir()
    (place / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        train_student(place, "other")


def test_the_grid_grows_at_an_edge_and_a_rate_that_explodes_is_an_outcome(place):
    extract(place)
    task = read_task(place / "task.toml")
    settings = stepwise_settings(**QUICK | {"learning_rates": [1e-6, 1e-5], "max_steps": 10})
    files = (place / "rows.jsonl", place / "rationales.jsonl")
    request = StepwiseRequest(task, *files, "mini:xxs", place / "grid", settings)
    trials = run_search(Search.prepare(request))
    rates = {arm: [trial["rate"] for trial in found] for arm, found in trials.items()}
    assert rates["step_by_step"] == rates["finetuning"] and len(rates["finetuning"]) > 2
    wild = stepwise_settings(**QUICK | {"learning_rates": [1e-3, 1e30], "arms": ["finetuning"]})
    request = StepwiseRequest(task, *files, "mini:xxs", place / "wild", wild)
    (found,) = run_search(Search.prepare(request)).values()
    failed = [trial for trial in found if trial["score"] is None]
    assert failed and "not finite" in failed[0]["failed"] and found[0]["score"] is not None


def test_a_dry_run_says_what_would_run_and_writes_nothing(place):
    extract(place)
    before = sorted(place.iterdir())
    done = CliRunner().invoke(
        app,
        [
            *("stepwise", "--task", str(place / "task.toml"), "--student", "mini:xxs"),
            *("--input", str(place / "rows.jsonl"), "--out", str(place / "out"), "--dry-run"),
            *("--rationales", str(place / "rationales.jsonl"), "--set", "max_steps=10"),
            *("--arms", "step_by_step,finetuning_same_tokens", "--alpha", "0.7"),
        ],
    )
    assert done.exit_code == 0, done.output
    cost = json.loads(done.stdout)
    both, longer = cost["arms"].values()
    assert both["steps"] == 10 < longer["steps"] and cost["trainings"] == 6
    assert longer["tokens"] == pytest.approx(both["tokens"], rel=0.05)
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    "words, said",
    [
        (["--set", "alpha=1"], "alpha is an option"),
        (["--set", "epoch=1"], "'epoch' is not a setting"),
        (["--arms", "dss"], "arms"),
        (["--student", "giant"], "not a model that can be loaded"),
        (["--rationales", "none.jsonl"], "none.jsonl"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_paragraph(place, words, said):
    command = ["stepwise", "--task", str(place / "task.toml"), "--input", str(place / "rows.jsonl")]
    done = CliRunner().invoke(app, [*command, "--out", str(place / "out"), *words])
    assert done.exit_code == 2 and said in done.output and "Traceback" not in done.output


def test_rates_without_a_plan_ask_no_teacher(place):
    command = ["extract", "--task", str(place / "task.toml"), "--input", str(place / "rows.jsonl")]
    command += ["--teacher", f"replay:{place / 'answers.jsonl'}", "--out", str(place / "out.jsonl")]
    done = CliRunner().invoke(app, [*command, "--rate", "prompt_tokens=9"])
    assert done.exit_code == 2 and "Add --plan" in done.output
    assert not (place / "out.jsonl").exists()


def test_a_stream_is_checked_before_a_teacher_is_asked(place):
    items = [{"id": f"{i}", "input": f"Premise: {i}", "label": "neutral"} for i in range(3)]
    items[2]["label"] = "Neutral"
    write_rows(place / "nli.jsonl", items)
    teacher = f"replay:{place / 'answers.jsonl'}"
    with pytest.raises(UserError, match="nli.jsonl, row 3: the label 'Neutral' is not one of"):
        extract_rationales(
            "nli", place / "out.jsonl", source=place / "nli.jsonl", teacher=teacher, stream=True
        )
    assert not (place / "out.jsonl").exists()


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_model_that_is_not_there_is_said_before_its_task(place, command):
    call = [command, "--model", "nowhere", "--input", str(place / "rows.jsonl")]
    done = CliRunner().invoke(app, [*call, "--output", str(place / "said")])
    assert done.exit_code == 2 and "not a model that can be loaded" in done.output


# --- kills ------------------------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
torch.set_num_threads(1)
from kd_notes.products.stepwise import stepwise
stepwise({task!r}, {data!r}, {rationales!r}, "mini:xxs", {out!r}, **{settings!r})
"""
LONG = QUICK | {"max_steps": 160, "evaluations": 1}


def start(place, out):
    code = SCRIPT.format(
        task=str(place / "task.toml"),
        data=str(place / "rows.jsonl"),
        rationales=str(place / "rationales.jsonl"),
        out=str(place / out),
        settings=LONG,
    )
    return start_script(code)


def kill_when(process, ready) -> None:
    for _ in range(4000):
        if ready():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    raise AssertionError("it never came so far")


def test_a_run_that_is_killed_twice_ends_with_the_same_weights(place):
    "kill -9 in the first training and again in a later one; the same call then gives the same student, to the bit."
    extract(place)
    out = place / "killed"
    process = start(place, "killed")
    kill_when(process, lambda: any(out.glob("work/step_by_step/*/run/checkpoints/step-*")))
    assert not (out / "report.json").exists()
    process = start(place, "killed")
    kill_when(process, lambda: any(out.glob("work/finetuning/*/run/checkpoints/step-*")))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("work/step_by_step/*/trial.json")}
    assert len(kept) == 1 and not (out / "report.json").exists()
    torch.set_num_threads(1)
    settings = LONG | {"student": "mini:xxs"}
    killed = train_student(place, "killed", **settings)
    whole = train_student(place, "whole", **settings)
    for name in ("model.safetensors", "compared/finetuning/model.safetensors", "examples.jsonl"):
        assert (out / name).read_bytes() == (place / "whole" / name).read_bytes()
    assert killed["arms"]["step_by_step"]["test"] == whole["arms"]["step_by_step"]["test"]


def test_predictions_go_on_after_a_kill(place):
    tok = load_mini_tokenizer()
    save_model(mini_model("causal", "xxs", len(tok), seed=2), place / "model", tok)
    code = (
        "import sys; from kd_notes.products.predict import predict_rows;"
        "predict_rows(*sys.argv[1:5], batch_size=2, max_new_tokens=8)"
    )
    out = place / "said.jsonl"
    write_rows(place / "rows.jsonl", rows(120))
    call = [str(place / name) for name in ("model", "rows.jsonl", "said.jsonl", "task.toml")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *call],
        env=os.environ | {"KD_NOTES_PROGRESS": "off", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    kill_when(process, lambda: out.is_file() and out.stat().st_size > 2000)
    done = {row["id"] for row in read_jsonl(out, repair_tail=True)}
    assert 0 < len(done) < 120
    options = {"batch_size": 2, "max_new_tokens": 8}
    made = predict_rows(*call, **options)
    assert made["rows"] == 120 and len(read_jsonl(out)) == 120
    call[2] = str(place / "whole.jsonl")
    predict_rows(*call, **options)
    both = [{row["id"]: row["text"] for row in read_jsonl(path)} for path in (out, call[2])]
    assert both[0] == both[1]


def test_an_input_beyond_the_context_is_an_outcome_and_another_task_is_refused(place):
    tok = load_mini_tokenizer()
    save_model(mini_model("causal", "xxs", len(tok), seed=2), place / "model", tok)
    items = [*rows(3), {"id": "long", "thing": "very " * 900, "colour": "red"}]
    made = predict_rows(place / "model", items, place / "said.jsonl", place / "task.toml")
    assert made["outcomes"]["too_long"] == 1
    score = evaluate_rows(place / "model", items, task=place / "task.toml")
    assert score["n"] == 4 and score["outcomes"]["too_long"] == 1
    with pytest.raises(UserError, match="which task it was trained for"):
        predict_rows(place / "model", items, place / "b.jsonl")
    with pytest.raises(UserError, match="1 of 1 rows have no label"):
        evaluate_rows(place / "model", [{"thing": "a"}], task=place / "task.toml")
    items[0]["thing"] = "another brick"
    with pytest.raises(UserError, match="has changed since it was answered"):
        predict_rows(place / "model", items, place / "said.jsonl", place / "task.toml")


@pytest.mark.parametrize("ask", [evaluate_rows, lambda *given: predict_rows(*given, "out.jsonl")])
def test_a_missing_file_is_named_before_a_model_is_loaded(ask):
    with pytest.raises(UserError, match="rows.jsonl: there is no such file"):
        ask("a model that does not exist", "no/rows.jsonl")


# ---------------------------------------------------------------- ids, labels and names


def test_zero_is_an_id(place):
    rows = [{"thing": "a", "id": 0}, {"thing": "b", "id": 1}, {"thing": "c", "id": None}]
    assert [e.id for e in task_examples(place / "task.toml", rows)] == ["0", "1", "colours-2"]
    with pytest.raises(UserError, match="'0' was already used"):
        task_examples(place / "task.toml", [{"thing": "a", "id": 0}, {"thing": "b", "id": "0"}])


@pytest.mark.parametrize("labels", ['["yes ", "yes"]', '["é", "e\u0301"]', '["Ja", "ja"]'])
def test_labels_that_cannot_be_told_apart_are_refused(tmp_path, labels):
    (tmp_path / "t.toml").write_text(f'name = "t"\nlabels = {labels}\n')
    with pytest.raises(UserError, match="occurs twice"):
        read_task(tmp_path / "t.toml")


def test_blanks_around_a_label_are_no_part_of_it(tmp_path):
    (tmp_path / "t.toml").write_text('name = "t-blank"\nlabels = ["yes ", " no"]\n')
    task = read_task(tmp_path / "t.toml")
    assert task.labels == ("yes", "no")
    assert task_examples(task, [{"input": "a", "label": "yes "}])[0].label == "yes"


@pytest.mark.parametrize(
    "line, said", [('name = "../x"', "name a task"), ('name = "a\\nb"', "name a task"), ('name = "t"\nlabel_field = ""', "label_field")]
)  # fmt: skip
def test_names_that_cannot_be_used_are_refused(tmp_path, line, said):
    (tmp_path / "t.toml").write_text(f'{line}\nlabels = ["yes", "no"]\n')
    with pytest.raises(UserError, match=said):
        read_task(tmp_path / "t.toml")


def test_a_text_task_in_another_script_is_measured():
    task = OwnTask("reply", "reply", score="rouge_l")
    rows = [Example("1", "reply", "问", "你好世界"), Example("2", "reply", "问", "привет мир")]
    assert task_score(task, {"1": "你好世界", "2": "привет мир"}, rows)["value"] == 1.0
