"Embedded teachers: what is committed is complete, says what its report says, and was made from the teacher split alone."

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from kd_notes.generation.backends import prompt_hash
from kd_notes.core import data_dir, read_json, UserError
from kd_notes.data.examples import load_split
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.methods.rationales import OUTCOMES, parse_for, ZERO_SHOT
from kd_notes.experiments.teachers import (
    adapt_teacher,
    ADAPTER,
    copied,
    in_template,
    label_accuracy,
    sampled_split,
    search_adapter,
    stored,
    teacher_dir,
    truncate_adapter,
    validity,
    vote_outcomes,
)

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
    report, rows, pool = (
        read_json(teacher_dir(task) / "report.json"),
        stored(task, "pool"),
        load_split(task, "pool"),
    )
    assert report["pool_n"] == len(pool) == 2000
    assert report["pool_accuracy"] == pytest.approx(label_accuracy(task, rows, pool))
    assert report["pool_valid"] == pytest.approx(validity(rows, pool))
    assert report["pool_copied"] == pytest.approx(copied(rows, pool))
    assert report["pool_template"] == pytest.approx(in_template(task, rows, pool))
    for name in (
        "test",
        "few_shot",
    ):  # the reference line of the figures, and what the adapter has bought
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
        again = {"prompt_hash": prompt_hash(ZERO_SHOT(example))} | asdict(
            parse_for(example, row["text"], row["finish"])
        )
        assert again == {name: row[name] for name in again}


@pytest.mark.parametrize("task", TASKS)
def test_the_adapter_is_small_and_half_precision(task):
    file = teacher_dir(task) / "adapter" / "adapter_model.safetensors"
    assert file.stat().st_size <= 10 * 2**20
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    settings = read_json(teacher_dir(task) / "adapter" / "training.json")
    assert (
        set(settings) - {"truncated"} == set(ADAPTER) | {"examples"}
        and settings["examples"] == len(load_split(task, "teacher")) <= 500
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_teacher_split_meets_no_other(task):
    own = {e.input for e in load_split(task, "teacher")}
    for split in ("pool", "unlabelled", "validation", "test"):
        assert not own & {e.input for e in load_split(task, split)}


def test_unknown_teacher_names_the_known_ones():
    with pytest.raises(UserError, match="nli"):
        teacher_dir("poetry")


@pytest.fixture
def base(tmp_path):
    "A folder with a small model."
    tok = load_mini_tokenizer()
    mini_model("causal", "xs", len(tok), seed=0).save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_adapting_a_small_model_writes_an_adapter_that_changes_it(base, tmp_path):
    out = adapt_teacher(
        load_split("nli", "teacher")[:32], tmp_path / "adapter", base=base, steps=3, rank=2
    )
    weights = load_file(out / "adapter_model.safetensors")
    assert any(k.endswith("lora_B.weight") and v.abs().max() > 0 for k, v in weights.items())
    assert json.loads((out / "training.json").read_text())["examples"] == 32


def products(folder):
    "B·A times its scale, layer by layer."
    weights, config = (
        load_file(folder / "adapter_model.safetensors"),
        read_json(folder / "adapter_config.json"),
    )
    return {
        n: config["lora_alpha"]
        / config["r"]
        * weights[n.replace("lora_A", "lora_B")].double()
        @ weights[n].double()
        for n in weights
        if n.endswith("lora_A.weight")
    }


def test_a_truncated_adapter_is_the_best_of_its_rank(base, tmp_path):
    whole = adapt_teacher(
        load_split("nli", "teacher")[:32], tmp_path / "whole", base=base, steps=4, rank=4, lr=0.02
    )
    was, now = products(whole), products(truncate_adapter(whole, 2, tmp_path / "cut"))
    for name, x in was.items():
        s = torch.linalg.svdvals(
            x
        )  # Eckart and Young: what is lost are the values that were cut off
        assert torch.linalg.matrix_rank(now[name], rtol=1e-2) <= 2
        assert (x - now[name]).norm().item() == pytest.approx(
            s[2:].norm().item(), rel=0.02, abs=2e-3 * s[0].item()
        )
    assert any(
        torch.linalg.svdvals(x)[2] > 0.01 * torch.linalg.svdvals(x)[0] for x in was.values()
    )  # there was something to lose
    with pytest.raises(UserError, match="rank 4 is not below"):
        truncate_adapter(whole, 4, tmp_path / "cut")


def test_settings_are_compared_on_validation_items_and_trained_once(base, tmp_path, monkeypatch):
    monkeypatch.setitem(ADAPTER, "base", base)
    tries = [{"rank": 1, "steps": 1}, {"rank": 2, "steps": 2}]
    found = search_adapter("nli", tries, tmp_path / "tries", n=3)
    assert sorted(r["rank"] for r in found) == [1, 2] and all(
        r["n"] == 3 and 0 <= r["accuracy"] <= 1 for r in found
    )
    assert found[0]["accuracy"] >= found[1]["accuracy"]
    monkeypatch.setattr(
        "kd_notes.experiments.teachers.adapt_teacher", lambda *a, **k: pytest.fail("trained twice")
    )
    assert search_adapter("nli", tries, tmp_path / "tries", n=3) == found


def test_a_vote_counts_the_first_samples_of_each_example():
    first, second = load_split("nli", "test")[:2]
    wrong = {
        e.id: next(x for x in ("entailment", "neutral", "contradiction") if x != e.label)
        for e in (first, second)
    }

    def row(e, k, right):
        return {
            "id": e.id,
            "sample": k,
            "outcome": "ok",
            "rationale": "r",
            "label": e.label if right else wrong[e.id],
        }

    rows = [row(first, k, k != 0) for k in range(3)] + [row(second, k, k == 0) for k in range(3)]
    assert vote_outcomes("nli", rows, 1).tolist() == [[0, 1]] and vote_outcomes(
        "nli", rows, 3
    ).tolist() == [[1, 0]]


def test_samples_of_an_example_differ_and_are_kept(base, tmp_path):
    from kd_notes.generation.backends import LocalBackend
    from kd_notes.models.pretrained import load_pretrained

    rows = sampled_split(
        "nli",
        LocalBackend(*load_pretrained(base), name="mini"),
        2,
        samples=3,
        temperature=1.0,
        folder=tmp_path,
    )
    assert (
        len(rows) == 6
        and len({r["text"] for r in rows}) > 2
        and (tmp_path / "samples.jsonl").is_file()
    )
