"Embedded teachers: what is committed is complete, says what its report says, and was made from the teacher split alone."
import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from kd_notes.backends import prompt_hash
from kd_notes.core import UserError, data_dir, read_json
from kd_notes.data import load_split
from kd_notes.models import load_mini_tokenizer, mini_model
from kd_notes.rationales import OUTCOMES, ZERO_SHOT, parse_for
from kd_notes.teachers import ADAPTER, adapt_teacher, copied, in_template, label_accuracy, stored, teacher_dir, validity

TASKS = sorted(p.parent.name for p in (data_dir() / "teacher").glob("*/report.json"))


def test_there_is_an_embedded_teacher():
    assert "nli" in TASKS


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["pool", "unlabelled"])
def test_every_example_of_a_pool_has_exactly_one_completion(task, split):
    rows = stored(task, split)
    assert sorted(r["id"] for r in rows) == sorted(e.id for e in load_split(task, split))
    assert {r["outcome"] for r in rows} <= set(OUTCOMES)


@pytest.mark.parametrize("task", TASKS)
def test_the_report_is_what_the_text_says(task):
    report, rows, pool = read_json(teacher_dir(task) / "report.json"), stored(task, "pool"), load_split(task, "pool")
    assert report["pool_n"] == len(pool) == 2000
    assert report["pool_accuracy"] == pytest.approx(label_accuracy(task, rows, pool))
    assert report["pool_valid"] == pytest.approx(validity(rows, pool))
    assert report["pool_copied"] == pytest.approx(copied(rows, pool))
    assert report["pool_template"] == pytest.approx(in_template(task, rows, pool))
    for name in ("test", "few_shot"):                                       # the reference line of the figures, and what the adapter has bought
        rows = stored(task, name)
        asked = [e for e in load_split(task, "test") if e.id in {r["id"] for r in rows}]
        assert report[f"{name}_n"] == len(asked) == len(rows)
        assert report[f"{name}_accuracy"] == pytest.approx(label_accuracy(task, rows, asked))
    assert report["test_accuracy"] > report["few_shot_accuracy"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["pool", "unlabelled", "test", "validation"])
def test_stored_text_belongs_to_the_examples_as_they_are_and_is_parsed_as_it_would_be(task, split):
    "A task that is made anew with the same ids would otherwise keep the reasons of the old one."
    if not (teacher_dir(task) / f"{split}.jsonl").exists():
        pytest.skip(f"no text for {split}")
    by_id = {e.id: e for e in load_split(task, split)}
    for row in stored(task, split):
        example = by_id[row["id"]]
        again = {"prompt_hash": prompt_hash(ZERO_SHOT(example))} | asdict(parse_for(example, row["text"], row["finish"]))
        assert again == {name: row[name] for name in again}


@pytest.mark.parametrize("task", TASKS)
def test_the_adapter_is_small_and_half_precision(task):
    file = teacher_dir(task) / "adapter" / "adapter_model.safetensors"
    assert file.stat().st_size <= 10 * 2**20
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    settings = read_json(teacher_dir(task) / "adapter" / "training.json")
    assert set(settings) == set(ADAPTER) | {"examples"} and settings["examples"] == len(load_split(task, "teacher")) <= 500


@pytest.mark.parametrize("task", TASKS)
def test_the_teacher_split_meets_no_other(task):
    own = {e.input for e in load_split(task, "teacher")}
    for split in ("pool", "unlabelled", "validation", "test"):
        assert not own & {e.input for e in load_split(task, split)}


def test_unknown_teacher_names_the_known_ones():
    with pytest.raises(UserError, match="nli"):
        teacher_dir("poetry")


def test_adapting_a_small_model_writes_an_adapter_that_changes_it(tmp_path):
    tok = load_mini_tokenizer()
    mini_model("causal", "xs", len(tok), seed=0).save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    out = adapt_teacher(load_split("nli", "teacher")[:32], tmp_path / "adapter", base=str(tmp_path / "base"), steps=3, rank=2)
    weights = load_file(out / "adapter_model.safetensors")
    assert any(k.endswith("lora_B.weight") and v.abs().max() > 0 for k, v in weights.items())
    assert json.loads((out / "training.json").read_text())["examples"] == 32
