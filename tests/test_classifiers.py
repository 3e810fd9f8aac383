"""A grader of answers and a reader of pictures by one command: what they learn, what stops them, a kill, and their use on new rows."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kd_notes.cli import app
from kd_notes.core import read_json, read_jsonl, UserError
from kd_notes.data.images import digit_images
from kd_notes.data.scoring import ITEMS, science_answers
from kd_notes.experiments import scoring
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.models.pretrained import count_parameters, weights_hash
from kd_notes.products.classifier_kinds import (
    Answers,
    classifier_settings,
    PictureSettings,
    read_given,
    split_rows,
)
from kd_notes.products.classifiers import load_classifier
from kd_notes.products.crate import command_of
from kd_notes.products.distill import distill
from kd_notes.products.predict import evaluate_rows, predict_rows
from kd_notes.products.share import export_student

FAST = {"max_steps": 12, "teacher_steps": 12, "learning_rates": [0.01]}
GRADER = FAST | {"members": 1, "folds": 2}
SETS = ["--set", "max_steps=12", "--set", "teacher_steps=12", "--set", "learning_rates=[0.01]"]


def answers(people: int = 20) -> list[dict]:
    return [
        {"id": row["id"], "prompt": ITEMS[row["item"]][0], "answer": row["answer"]}
        | {"score": row["score"], "person": row["person"]}
        for row in science_answers(people=people, seed=1, noise=0.15)
    ]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with answers, with digits as files, and with a grader and a reader made from them."
    folder = tmp_path_factory.mktemp("place")
    write(folder / "answers.jsonl", answers())
    pool = digit_images("pool")
    rows = []
    for number in range(90):
        pixels = (255 * pool.pixels[number].numpy()).round().astype("uint8")
        Image.fromarray(pixels).save(folder / f"{number}.png")
        label = int(pool.labels[number])
        rows.append({"id": f"d{number}", "image": f"{number}.png", "label": label})
    write(folder / "pictures.jsonl", rows)
    grade(folder, folder / "grader")
    read(folder, folder / "reader")
    return folder


def grade(place, out, data="answers.jsonl", teacher="words", **more):
    rows = place / data if isinstance(data, str) else data
    return distill(rows, teacher, objective="scoring", out=out, **GRADER | more)


def read(place, out, data="pictures.jsonl", **more):
    rows = place / data if isinstance(data, str) else data
    return distill(rows, objective="classic_kd", out=out, **FAST | more)


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


# --- the folder -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, labels", [("grader", [0, 1, 2]), ("reader", [*"0123456789"])])
def test_a_folder_says_what_was_found_and_answers_as_its_report_does(place, tmp_path, name, labels):
    report = read_json(place / name / "report.json")
    assert report["labels"] == labels and not (place / name / "work").exists()
    models = ["teacher", "student", "alone", "smoothing"]
    assert sorted(report["results"]) == sorted(models)
    sizes = [report["results"][name]["parameters"] for name in models]
    assert sizes[1] == sizes[2] == sizes[3] < sizes[0]
    assert report["times_smaller"] == pytest.approx(sizes[0] / sizes[1], abs=0.01)
    assert set(report["milliseconds"]) == {"teacher", "student", "faster"}
    assert ("kappa" in report["results"]["student"]) is (name == "grader")
    examples = read_jsonl(place / name / "examples.jsonl")
    assert len(examples) == min(20, report["rows"]["test"])
    data = {"grader": "answers", "reader": "pictures"}[name]
    predict_rows(place / name, place / f"{data}.jsonl", tmp_path / "said.jsonl")
    said = {row["id"]: row for row in read_jsonl(tmp_path / "said.jsonl")}
    assert all(said[row["id"]]["answer"] == row["answers"]["student"] for row in examples)
    assert all(0 < row["probability"] <= 1 for row in said.values())
    kind, model = load_classifier(place / name)
    assert count_parameters(model) == sizes[1] and kind.labels == labels
    card = (place / name / "README.md").read_text()
    assert f"{report['results']['student']['accuracy']['value']:.3f} [" in card
    assert ("quadratic kappa" in card) is (name == "grader")


def test_the_measures_are_those_of_scikit_learn_on_the_test_rows(place):
    from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score

    report = read_json(place / "grader" / "report.json")
    rows = read_given(place / "answers.jsonl", Answers, {})
    s = classifier_settings("scoring", **GRADER)
    Answers.label(rows, s)
    test = split_rows(rows, s)["test"]
    kind, model = load_classifier(place / "grader")
    given = kind.probabilities(model, test).argmax(1)
    wanted = [row["score"] for row in test]
    found = report["results"]["student"]
    assert found["accuracy"]["value"] == pytest.approx(accuracy_score(wanted, given))
    assert found["macro_f1"]["value"] == pytest.approx(f1_score(wanted, given, average="macro"))
    assert found["kappa"] == pytest.approx(cohen_kappa_score(wanted, given, weights="quadratic"))


def test_a_group_is_never_divided():
    rows = read_given(answers(15), Answers, {})
    same = [row | {"id": f"again-{row['id']}", "person": None} for row in answers(15)]
    twice = read_given([row | {"person": None} for row in answers(15)] + same, Answers, {})
    for given in (rows, twice):
        splits = split_rows(given, classifier_settings("scoring"))
        groups = [{row["group"] for row in part} for part in splits.values()]
        assert all(groups) and sum(map(len, groups)) == len(set().union(*groups))
        assert sum(map(len, splits.values())) == len(given)
    assert len({row["group"] for row in rows}) == 15


# --- the teachers ---------------------------------------------------------------------------------------------------------------


def state(folder):
    return load_classifier(folder)[1].state_dict()


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_without_a_weight_of_the_teacher_a_student_is_the_student_alone(place, tmp_path):
    plain = grade(place, tmp_path / "a", weight=0.0, label_smoothing=0.0)["results"]
    assert list(plain) == ["teacher", "student", "alone"]
    assert plain["student"]["trials"] == plain["alone"]["trials"]
    taught = read_json(place / "grader" / "report.json")["results"]
    assert taught["student"]["trials"] != taught["alone"]["trials"]
    soft = read_json(place / "reader" / "report.json")["results"]
    assert soft["student"]["trials"] != soft["alone"]["trials"]


def test_each_way_to_teach_pictures_gives_another_student(place, tmp_path):
    ways = {
        "hints": {"hints": 0.5},
        "dkd": {"divergence": "dkd", "options": {"beta": 8.0}},
        "cold": {"temperature": 1.0},
    }
    made = [state(place / "reader")]
    for name, settings in ways.items():
        read(place, tmp_path / name, label_smoothing=0.0, **settings)
        made.append(state(tmp_path / name))
    assert not any(same(made[i], made[j]) for i in range(4) for j in range(i))


def test_frozen_layers_are_read_once_and_count_as_the_teacher(place, tmp_path, monkeypatch):
    tokenizer = load_mini_tokenizer()
    model = mini_model("causal", "xs", len(tokenizer), seed=0)
    body, calls = model.model.eval(), []
    monkeypatch.setattr(scoring, "lower_layers", lambda layers: (body, tokenizer))
    read_states = scoring.frozen_states
    monkeypatch.setattr(
        scoring, "frozen_states", lambda *args: calls.append(args) or read_states(*args)
    )
    monkeypatch.setattr(
        "kd_notes.products.classifiers.weights_identity", lambda source: weights_hash(model)
    )
    report = grade(place, tmp_path / "a", teacher=None)
    assert len(calls) == 1 and calls[0][1] == 10 and report["teacher"] == "smollm2"
    assert calls[0][0][0]["prompt"].startswith("Question: Why ")
    plain = read_json(place / "grader" / "report.json")["results"]
    more = report["results"]["teacher"]["parameters"] - plain["teacher"]["parameters"]
    assert more > count_parameters(body)
    assert report["results"]["alone"] == plain["alone"]  # nothing of the teacher reaches it
    assert report["results"]["student"]["trials"] != plain["student"]["trials"]


# --- folders, kills and processes ------------------------------------------------------------------------------------------------


def test_a_killed_command_ends_as_if_nothing_had_happened(place, tmp_path):
    "A real process of the command line, kill -9 between two trainings; the same command goes on."
    words = ["distill", "--objective", "scoring", "--teacher", "words", *SETS, "--set", "members=1"]
    words += ["--set", "folds=2", "--input", str(place / "answers.jsonl"), "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kd_notes.cli", *words, str(tmp_path / "killed")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "KD_NOTES_PROGRESS": "off"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    first = tmp_path / "killed" / "work" / "teacher-1" / "checkpoints"
    end = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert first.exists(), process.stderr.read().decode()
    assert not (tmp_path / "killed" / "report.json").exists()
    done = command(*words, tmp_path / "killed")
    assert done.exit_code == 0, done.output
    weights = [
        (f / "model.safetensors").read_bytes() for f in (tmp_path / "killed", place / "grader")
    ]
    assert weights[0] == weights[1]
    results = [read_json(f / "report.json") for f in (tmp_path / "killed", place / "grader")]
    assert results[0]["results"] == results[1]["results"]
    again = command(*words, tmp_path / "killed")
    assert again.exit_code == 0 and "finished already" in again.output


def test_another_request_leaves_a_finished_folder_as_it_is(place):
    before = (place / "reader" / "report.json").read_bytes()
    with pytest.raises(UserError, match="another temperature"):
        read(place, place / "reader", temperature=2.0)
    with pytest.raises(UserError, match="another .*objective"):
        grade(place, place / "reader")
    rows = read_jsonl(place / "pictures.jsonl")
    rows[0]["label"] = (rows[0]["label"] + 1) % 10
    with pytest.raises(UserError, match="another data and data_sha256"):
        read(place, place / "reader", write(place / "others.jsonl", rows))
    assert (place / "reader" / "report.json").read_bytes() == before


def test_a_picture_that_has_changed_is_another_request(place, tmp_path):
    write(tmp_path / "pictures.jsonl", read_jsonl(place / "pictures.jsonl"))
    for file in place.glob("*.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert read(tmp_path, place / "reader")["data"] == "pictures.jsonl"  # the same one
    (tmp_path / "3.png").write_bytes((place / "4.png").read_bytes())
    with pytest.raises(UserError, match="another data_sha256"):
        read(tmp_path, place / "reader")


# --- use --------------------------------------------------------------------------------------------------------------------------


def test_new_rows_need_no_label_and_a_second_call_answers_what_is_missing(place, tmp_path):
    rows = [{k: row[k] for k in ("id", "prompt", "answer")} for row in answers(3)]
    data = write(tmp_path / "new.jsonl", rows)
    done = command(
        "predict", "--model", place / "grader", "--input", data, "--output", tmp_path / "o"
    )
    assert done.exit_code == 0, done.output
    whole = (tmp_path / "o").read_text()
    (tmp_path / "o").write_text("".join(whole.splitlines(True)[:5])[:-20])  # cut in a row
    assert predict_rows(place / "grader", data, tmp_path / "o")["rows"] == len(rows)
    assert (tmp_path / "o").read_text() == whole
    write(data, [rows[0] | {"answer": "another"}])
    with pytest.raises(UserError, match="has changed since it was answered"):
        predict_rows(place / "grader", data, tmp_path / "o")


def test_labelled_rows_are_scored(place, tmp_path):
    found = evaluate_rows(place / "reader", place / "pictures.jsonl", tmp_path / "scores.json")
    assert found == read_json(tmp_path / "scores.json") and found["n"] == 90
    predict_rows(place / "reader", place / "pictures.jsonl", tmp_path / "o")
    wanted = [str(row["label"]) for row in read_jsonl(place / "pictures.jsonl")]
    given = [row["answer"] for row in read_jsonl(tmp_path / "o")]
    assert found["value"] == pytest.approx(np.mean([a == b for a, b in zip(given, wanted)]))
    rows = [{"image": str(place / "1.png"), "label": "ten"}]
    with pytest.raises(UserError, match="the label 'ten' is none of 0, 1"):
        evaluate_rows(place / "reader", rows)


def test_a_student_can_leave_its_machine(place, tmp_path):
    names = export_student(place / "grader", tmp_path / "out")
    assert set(names) == {"README.md", "config.json", "model.safetensors", "report.json"}
    assert same(state(tmp_path / "out"), state(place / "grader"))
    for name in ("grader", "reader"):
        report = read_json(place / name / "report.json")
        words = command_of(report, place / name)[1:]
        words[words.index("--data") + 1] = place / report["data"]
        done = command(*words)
        assert done.exit_code == 0 and "finished already" in done.output, done.output


@pytest.mark.parametrize(
    "rows, options, match",
    [
        ([{"prompt": "Why?"}], {}, "'answer' is missing"),
        ([{"prompt": "Why?", "answer": "so"}], {"task": "nli"}, "has no task"),
        ([{"prompt": "Why?", "answer": "so"}], {"max_new_tokens": 5}, "has no max_new_tokens"),
        ([{"prompt": "Why?", "answer": "so"}], {"batch_size": 0}, "batch_size"),
        ([], {}, "no rows"),
        (["Why?"], {}, "row 0: a row cannot be a str"),
    ],
)
def test_rows_that_cannot_be_answered_are_one_sentence(place, tmp_path, rows, options, match):
    with pytest.raises(UserError, match=match):
        predict_rows(place / "grader", rows, tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()


# --- what stops a call ---------------------------------------------------------------------------------------------------------


def refused(out, match, call):
    with pytest.raises(UserError, match=match):
        call(out)
    assert not out.exists()


@pytest.mark.parametrize(
    "change, settings, match",
    [
        ({"score": 3}, {"scores": 3}, "the score 3 is outside the rubric"),
        ({"score": -1}, {}, "the score -1 is outside"),
        ({"score": 1.5}, {}, "the score 1.5 is outside"),
        ({"score": None}, {}, "the score None is outside"),
        ({"score": 2000}, {}, "setting scores"),
        ({"answer": 5}, {}, "'answer' is no text"),
        ({"prompt": None}, {}, "'prompt' is missing"),
        ({"id": "ice.1-0"}, {}, "already used at .*answers.jsonl:2"),
        (
            {"score": 3},
            {},
            "too few training rows have the score 3 .[01] different, and each of the 2 folds",
        ),
    ],
)
def test_an_answer_that_cannot_be_used_is_named(tmp_path, change, settings, match):
    rows = answers()
    rows[4] |= change
    write(tmp_path / "answers.jsonl", rows)
    refused(tmp_path / "out", match, lambda out: grade(tmp_path, out, **settings))


def test_a_single_score_teaches_nothing(tmp_path):
    rows = [row | {"score": 1} for row in answers(5)]
    refused(tmp_path / "out", "all 20 rows have the score 1", lambda out: grade(None, out, rows))


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"temperature": 2.0}, "'temperature' is not a setting of objective scoring"),
        ({"lora": {"r": 8}}, "'lora' is not a setting"),
        ({"student": "layers:2"}, "scoring takes no student"),
        ({"corpus": ["text"]}, "scoring takes no corpus"),
        ({"rows": "select"}, "scoring takes no rows"),
        ({"teacher": "hub:org/model"}, "cannot teach scores here. Use smollm2 or words"),
        ({"teacher": ["smollm2", "words"]}, "cannot teach scores here"),
        ({"folds": 1}, "setting folds"),
        ({"weight": -1.0}, "the weight -1.0 is not possible"),
        ({"learning_rates": []}, "learning_rates"),
        ({"learning_rates": [0.01, -1]}, "learning_rates"),
        ({"validation": 0.0}, "cannot be held out"),
        ({"profile": "laptop"}, "not a profile"),
    ],
)
def test_an_option_of_scoring_that_makes_no_sense_is_one_sentence(place, tmp_path, settings, match):
    refused(tmp_path / "out", match, lambda out: grade(place, out, **settings))


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"teacher": "smollm2"}, "classic_kd trains its own teacher"),
        ({"folds": 3}, "'folds' is not a setting of objective classic_kd"),
        ({"divergence": "nonsense"}, "nonsense"),
        ({"divergence": "dkd", "options": {"gamma": 1}}, "gamma"),
        ({"divergence": "dkd", "hints": 0.5}, "setting hints"),
        ({"hints": 1.0}, "setting hints"),
        ({"temperature": 0.0}, "temperature"),
        ({"sft_weight": 2.0}, "sft_weight"),
        ({"widths": []}, "setting widths"),
        ({"widths": [0]}, "setting widths"),
        ({"label_smoothing": 0.9}, "label_smoothing"),
        ({"tracker": "trackyo"}, "not a tracker"),
    ],
)
def test_an_option_of_pictures_that_makes_no_sense_is_one_sentence(
    place, tmp_path, settings, match
):
    refused(tmp_path / "out", match, lambda out: read(place, out, **settings))


@pytest.mark.parametrize(
    "name, match",
    [
        ("none.png", "none.png cannot be opened .No such file"),
        ("text.png", "text.png cannot be opened .it is damaged, or no picture"),
        ("half.png", "half.png cannot be opened"),
        ("wide.png", "the picture has 9 by 8 pixels, and others have 8 by 8. .*--set size=16"),
        ("vast.png", "has 200 by 200 pixels"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named_with_its_line(place, tmp_path, name, match):
    (place / "text.png").write_text("no picture")
    (place / "half.png").write_bytes((place / "1.png").read_bytes()[:60])
    Image.new("L", (9, 8)).save(place / "wide.png")
    Image.new("L", (200, 200)).save(place / "vast.png")
    rows = read_jsonl(place / "pictures.jsonl")
    rows[5]["image"] = name
    data = write(place / "wrong.jsonl", rows)
    refused(tmp_path / "out", f"wrong.jsonl:6: .*{match}", lambda out: read(place, out, data))


def test_pictures_of_many_sizes_can_be_resized(place, tmp_path):
    rows = read_jsonl(place / "pictures.jsonl")
    Image.new("RGB", (40, 20), "red").save(place / "red.png")
    rows[5]["image"] = "red.png"
    data = write(place / "sizes.jsonl", rows)
    read(place, tmp_path / "out", data, size=6, colour=True, label_smoothing=0.0)
    config = read_json(tmp_path / "out" / "config.json")
    assert config["shape"] == [6, 6, 3]
    new = [{"image": str(place / "red.png")}, {"image": str(place / "1.png")}]
    assert predict_rows(tmp_path / "out", new, tmp_path / "o")["rows"] == 2
    with pytest.raises(UserError, match="has 40 by 20 pixels, and others have 8 by 8"):
        predict_rows(place / "reader", new, tmp_path / "p")


@pytest.mark.parametrize("label", [None, "", 1.5, True, [1]])
def test_a_label_is_text_or_a_whole_number(place, tmp_path, label):
    rows = read_jsonl(place / "pictures.jsonl")
    rows[2]["label"] = label
    data = write(place / "labels.jsonl", rows)
    refused(tmp_path / "out", "neither text nor a whole number", lambda out: read(place, out, data))


def test_pictures_need_two_classes_and_small_sides(place, tmp_path):
    rows = [row | {"label": "one"} for row in read_jsonl(place / "pictures.jsonl")]
    data = write(place / "one.jsonl", rows)
    refused(tmp_path / "a", "all 90 rows have the label 'one'", lambda out: read(place, out, data))
    Image.new("L", (200, 200)).save(place / "large.png")
    large = write(place / "large.jsonl", [{"image": "large.png", "label": i} for i in range(2)])
    refused(tmp_path / "b", "200 by 200 pixels are too large", lambda out: read(place, out, large))


def test_a_missing_library_and_a_missing_file_are_one_sentence(place, tmp_path, monkeypatch):
    refused(tmp_path / "a", "cannot be read", lambda out: read(place, out, "nothing.jsonl"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(tmp_path / "b", "pillow is not installed. Run `pip install", lambda o: read(place, o))


def test_a_launch_of_several_processes_is_refused(place, tmp_path, monkeypatch):
    for name, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    refused(tmp_path / "a", "trains in one process", lambda out: read(place, out))


def test_the_method_of_pictures_is_the_one_of_the_settings():
    from kd_notes.data.images import Images
    from kd_notes.experiments.images import FitNetsKD, ImageKD

    images = Images(torch.rand(4, 8, 8), torch.arange(4))
    logits = torch.randn(4, 4)
    made = PictureSettings(divergence="dkd", options={"alpha": 2.0}).method(images, logits)
    assert isinstance(made, ImageKD) and made.divergence == "dkd" and made.options == {"alpha": 2.0}
    assert made.temperature == 4.0 and made.scale == pytest.approx(16.0)
    assert isinstance(PictureSettings(hints=0.2).method(images, logits), FitNetsKD)
