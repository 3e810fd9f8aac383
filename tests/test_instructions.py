"""Scores of models on instruction sets, as `kd-notes evaluate` gives them."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kd_notes.cli import app
from kd_notes.core import read_jsonl, UserError
from kd_notes.evaluation.text import rouge_l
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.products.instructions import (
    alpaca_prompt,
    asked_rows,
    evaluate_instructions,
    is_instruction_set,
)
from kd_notes.training.checkpoint import save_model

SHORT = {"template": "alpaca", "max_prompt": 64, "max_new_tokens": 8, "samples": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [
        {"id": f"r{i}", "instruction": f"Say {i}.", "input": "" if i % 2 else "now", "output": out}
        for i, out in enumerate(["one", ["two", "two three"], "four", "five", "six"])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "A cache folder in the hub's layout with one model in it."
    folder = tmp_path_factory.mktemp("cache") / "hub"
    repo = folder / "models--MiniLLM--tiny"
    tok = load_mini_tokenizer()
    save_model(mini_model("causal", "xxs", len(tok), seed=0), repo / "snapshots/0123abc", tok)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123abc")
    return folder


@pytest.fixture
def model(hub):
    return hub / "models--MiniLLM--tiny/snapshots/0123abc"


def test_alpaca_has_one_layout_with_an_input_and_one_without():
    alone = alpaca_prompt("Do it.")
    both = alpaca_prompt("Do it.", "With this.")
    assert alone.endswith("request.\n\n### Instruction:\nDo it.\n\n### Response:\n")
    assert both.endswith("Do it.\n\n### Input:\nWith this.\n\n### Response:\n")
    assert "paired with an input" in both and "paired" not in alone


def test_rows_keep_all_references(rows):
    asked = asked_rows(str(rows), "alpaca")
    assert asked[1].references == ("two", "two three")
    assert "### Input:\nnow" in asked[0].prompt and "### Input" not in asked[1].prompt


def test_a_prompt_of_messages_is_asked_by_its_words(tmp_path):
    asked = [{"role": "user", "content": "Say hello."}]
    told = [{"role": "assistant", "content": "Hello."}]
    row = {"prompt": asked, "response": "Hello."}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (read,) = asked_rows(str(file), "alpaca")
    assert read.prompt == alpaca_prompt("Say hello.") and read.references == ("Hello.",)
    row = {"prompt": asked + told + asked, "response": "Hello."}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="earlier turn"):
        asked_rows(str(file), "alpaca")


def test_a_file_that_is_not_there_is_not_replaced_by_another(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    assert len(asked_rows("mine.jsonl", "chat")) == 1
    with pytest.raises(UserError, match="gone/mine.jsonl"):
        asked_rows(str(tmp_path / "gone" / "mine.jsonl"), "chat")


def test_names_of_sets_and_files():
    assert is_instruction_set("dolly") and is_instruction_set("hub:some/set")
    assert not is_instruction_set("dolly.jsonl") and not is_instruction_set("rows.jsonl")


def test_scores_are_those_of_the_stored_answers(rows, model, tmp_path):
    scores = evaluate_instructions(model, rows, tmp_path / "s.json", **SHORT)
    stored = {row["id"]: row["text"] for row in read_jsonl(tmp_path / "s.answers.jsonl")}
    asked = asked_rows(str(rows), "alpaca")
    assert len(stored) == 3 * len(asked)
    greedy = rouge_l(
        [stored[f"greedy: {row.id}"] for row in asked], [list(row.references) for row in asked]
    )
    assert scores["greedy"]["rouge_l"] == pytest.approx(100 * greedy.mean())
    assert json.loads((tmp_path / "s.json").read_text()) == scores


def test_a_killed_run_goes_on_with_the_same_answers(rows, model, tmp_path):
    whole = evaluate_instructions(model, rows, tmp_path / "whole.json", **SHORT)
    evaluate_instructions(model, rows, tmp_path / "cut.json", **SHORT)
    file = tmp_path / "cut.answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]) + lines[7][:5])  # killed while it wrote a line
    again = evaluate_instructions(model, rows, tmp_path / "cut.json", batch_size=1, **SHORT)
    assert again == whole
    texts = [
        {r["id"]: r["text"] for r in read_jsonl(tmp_path / f"{n}.answers.jsonl")}
        for n in ("whole", "cut")
    ]
    assert texts[0] == texts[1]


def test_changed_rows_are_another_job(rows, model, tmp_path):
    evaluate_instructions(model, rows, tmp_path / "s.json", limit=3, **SHORT)
    other = tmp_path / "rows.jsonl"
    other.write_text(rows.read_text().replace("Say 0.", "Say nothing."))
    with pytest.raises(UserError, match="belongs to another job"):
        evaluate_instructions(model, other, tmp_path / "s.json", limit=3, **SHORT)


def test_long_prompts_are_cut_and_counted(rows, model):
    scores = evaluate_instructions(model, rows, **SHORT | {"max_prompt": 10, "samples": 0})
    assert scores["cut"] == 5 and scores["sampled"] is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"template": "vicuna"}, "no layout 'vicuna'"),
        ({"samples": 6}, "there are 5 seeds"),
        ({"samples": -1}, "samples"),
        ({"max_new_tokens": 100_000}, "the context has"),
        ({"limit": 0}, "limit"),
    ],
)
def test_a_wrong_option_is_one_sentence(rows, model, change, message):
    with pytest.raises(UserError, match=message):
        evaluate_instructions(model, rows, **SHORT | change)


def test_a_row_without_a_reference_is_named(model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": []}\n')
    with pytest.raises(UserError, match="rows.jsonl:2"):
        evaluate_instructions(model, file, **SHORT)


def test_an_encoder_decoder_is_refused(rows, tmp_path):
    tok = load_mini_tokenizer()
    save_model(mini_model("t5", "xs", len(tok), seed=0), tmp_path / "t5", tok)
    with pytest.raises(UserError, match="encoder-decoder"):
        evaluate_instructions(tmp_path / "t5", rows, **SHORT)


def test_a_task_is_no_option_of_instructions(rows):
    words = ["evaluate", "--model", "x", "--input", str(rows), "--template", "alpaca"]
    done = CliRunner().invoke(app, [*words, "--task", "task.toml"])
    assert done.exit_code == 2 and "instructions have no task" in done.output


def test_the_command_scores_a_model_in_the_layout_of_the_hub(hub):
    command = "evaluate --model hub:MiniLLM/tiny --input prompts --template alpaca --limit 2"
    limits = "--samples 1 --max-new-tokens 4"
    code = "from kd_notes.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), *limits.split()],
        capture_output=True,
        text=True,
        env={"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(hub)},
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores["rows"] == 2 and scores["weights"] == "0123abc"
    assert {"rouge_l", "low", "high"} <= scores["sampled"].keys()
