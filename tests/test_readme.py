"""README.md is the index notebook, its tables are those of the record, and what it tells the reader to type works."""

import json
import re
import shutil
from pathlib import Path

import pytest
from readme import NOTE, ROOT, convert, execute, from_root

README = (ROOT / "README.md").read_text(encoding="utf-8")
AGAIN = "Run: make readme, and commit README.md, nbs/index.ipynb and nbs/images."


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


def test_readme_is_the_converted_index():
    import nbformat

    assert README == convert(nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)), AGAIN
    assert README.startswith(NOTE)


def test_tables_and_figure_are_those_of_the_record(tmp_path):
    "The index, run again on the present data/expected, profiles and published notebooks, gives the committed text and figure."
    copy = tmp_path / "nbs"
    shutil.copytree(ROOT / "nbs", copy, ignore=shutil.ignore_patterns(".*"))
    fresh = convert(execute(copy))
    assert fresh == README, AGAIN
    assert (copy / "images" / "headline.png").read_bytes() == (
        ROOT / "nbs" / "images" / "headline.png"
    ).read_bytes(), AGAIN


def test_every_link_of_the_readme_leads_somewhere():
    links = [
        link for link in re.findall(r"\]\(([^)\s]+)\)", README) if not re.match(r"[a-z]+:|#", link)
    ]
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize(
    "link, seen",
    [
        ("images/a.png", "nbs/images/a.png"),
        ("../data/README.md", "data/README.md"),
        (".", "nbs"),
        ("https://a.example/b", "https://a.example/b"),
        ("#status", "#status"),
    ],
)
def test_links_are_rewritten_for_the_folder_above(link, seen):
    assert from_root(link) == seen


def test_the_three_lines_run(tmp_path, monkeypatch, capsys):
    "The library in three lines, with fewer steps."
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    lines = snippets()[0]
    assert len(lines.splitlines()) == 3 and "steps=800" in lines
    exec(lines.replace("steps=800", "steps=2"), {})
    accuracy, parameters = capsys.readouterr().out.splitlines()[-1].split()
    assert 0 <= float(accuracy) <= 1 and int(parameters) > 100_000


def test_your_own_data_run(tmp_path, monkeypatch):
    "A file in the schema of the README and a teacher's rows become a trained student, with fewer steps."
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "id": f"mine-{i}",
            "input": f"Premise: A dog sleeps {i}. Hypothesis: An animal rests.",
            "label": "entailment",
        }
        for i in range(9)
    ]
    said = [
        {"id": r["id"], "rationale": "A dog is an animal.", "label": "entailment", "outcome": "ok"}
        for r in rows
    ]
    for name, content in (("mine", rows), ("rationales", said)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    training = next(text for text in snippets() if "steps=500" in text)
    exec(training.replace("steps=500", "steps=2"), {})
    assert Path("my-run/metrics.jsonl").stat().st_size > 0


def test_the_loss_of_the_readme_runs():
    import torch

    names = {
        "student_logits": torch.zeros(2, 3, 5),
        "teacher_logits": torch.zeros(2, 3, 5),
        "response_mask": torch.ones(2, 3),
    }
    exec(next(text for text in snippets() if "reverse_kl" in text), names)
    assert names["loss"].item() == 0
