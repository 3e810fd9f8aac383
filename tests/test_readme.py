"""README.md is the index notebook, its tables are those of the record, and what it tells the reader to type works."""

import json
import re
import shutil
from pathlib import Path

import pytest

from kd_notes.core import read_json, UserError
from kd_notes.runner import readme as readme_module
from kd_notes.runner.notebooks import open_book, read_notebook, result_names

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
AGAIN = (
    "Run: make readme, and commit README.md, nbs/index.ipynb, nbs/images and nbs/results/claims.md."
)


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


def test_readme_is_the_converted_index():
    index = read_notebook(ROOT / "nbs" / "index.ipynb")
    assert README == readme_module.readme_text(index), AGAIN
    assert README.startswith(readme_module.NOTE)


def test_tables_and_figure_are_those_of_the_record(tmp_path):
    "The index, run again on the present record, profiles and published notebooks, gives the committed text and figure."
    copy = tmp_path / "nbs"
    shutil.copytree(ROOT / "nbs", copy, ignore=shutil.ignore_patterns(".*"))
    assert readme_module.readme_text(readme_module.run_index(copy)) == README, AGAIN
    figures = [root / "nbs" / "images" / "headline.png" for root in (tmp_path, ROOT)]
    assert figures[0].read_bytes() == figures[1].read_bytes(), AGAIN


def test_every_row_is_a_notebook_with_a_claim_of_its_own():
    rows = readme_module.front_rows()
    names = [row.notebook for row in rows]
    assert len(set(names)) == len(names) and set(names) <= set(result_names(open_book()))
    assert len({row.claim for row in rows}) == len(rows)
    table = readme_module.experiments_table(open_book(), rows)
    widths = {line.count(" | ") for line in table.splitlines()}
    assert widths == {5} and len(table.splitlines()) == len(rows) + 2


CLAIM = {"claim": "A beats B (nli)", "kind": "claim", "outcome": "supported", "value": 15.7}
CLAIM |= {"low": 9.2, "high": 22.0, "n": 5, "unit": "points", "why": "the interval excludes 0"}


@pytest.mark.parametrize(
    "verdicts, cells",
    [
        ([], ("–", "–")),
        ([CLAIM], ("1 supported", "nli: 15.7 [9.2, 22.0] points")),
        # a control that comes out as it should is no success of the paper
        ([CLAIM, CLAIM | {"kind": "control"}], ("1 supported", "nli: 15.7 [9.2, 22.0] points")),
        ([CLAIM | {"kind": "control"}], ("–", "–")),
        (
            [CLAIM | {"kind": "question", "unit": "nats", "claim": "less KL"}],
            ("1 supported", "less KL: 15.7 [9.2, 22] nats"),
        ),
        (
            [CLAIM, CLAIM | {"outcome": "undecided"}, CLAIM | {"outcome": "not testable"}],
            (
                "1 supported, 1 undecided, 1 not testable",
                "; ".join(["nli: 15.7 [9.2, 22.0] points"] * 3),
            ),
        ),
    ],
)
def test_a_row_counts_the_claims_and_shows_their_units(verdicts, cells):
    assert readme_module.outcome_cells({"verdicts": verdicts}) == cells


def test_claims_about_one_thing_are_told_apart():
    "The words before the first difference, and what the claim is about, are left out."
    named = [
        CLAIM | {"claim": f"A beats B, facts {facts} (nli)"} for facts in ("known", "unknown")
    ] + [CLAIM | {"claim": "A beats B, facts known (cqa)"}]
    _, shown = readme_module.outcome_cells({"verdicts": named})
    assert [text.partition(":")[0] for text in shown.split("; ")] == [
        "nli, known",
        "nli, unknown",
        "cqa",
    ]


def test_a_number_of_the_page_is_that_of_the_verdict_in_the_record(tmp_path):
    "The hops from the page to the run: table, record, verdicts.json."
    book = open_book()
    row = readme_module.front_rows()[0]
    path = book.expected / "cpu-full" / f"{row.notebook}.json"
    stored = read_json(path) | {"verdicts": [CLAIM | {"value": 3.25, "low": 1.5, "high": 5.0}]}
    other = tmp_path / "data" / "expected" / "cpu-full"
    other.mkdir(parents=True)
    (other / path.name).write_text(json.dumps(stored))
    moved = type(book)(book.nbs, tmp_path / "data", book.runs)
    assert "nli: 3.2 [1.5, 5.0] points" in readme_module.experiments_table(moved, [row])


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
    assert readme_module.link_from_root(link) == seen


def test_the_four_lines_run(tmp_path, monkeypatch, capsys):
    "A student in four lines, with fewer steps."
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    lines = next(text for text in snippets() if '"steps": 800' in text)
    assert len(lines.splitlines()) == 4
    exec(lines.replace('"steps": 800', '"steps": 2'), {})
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
    training = next(text for text in snippets() if "max_steps=500" in text)
    exec(training.replace("max_steps=500", "max_steps=2"), {})
    assert Path("my-run/metrics.jsonl").stat().st_size > 0


def test_the_loss_of_the_readme_runs():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=16, num_attention_heads=2)
    student, teacher = (
        LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers)) for layers in (1, 2)
    )
    ids = torch.randint(0, 11, (2, 6))
    labels = ids.masked_fill(torch.arange(6) < 3, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    names = {"student": student, "teacher": teacher, "batch": batch}
    exec(next(text for text in snippets() if "reverse_kl" in text), names)
    log_q = student(**batch).logits[:, 2:-1].log_softmax(-1)
    log_p = teacher(**batch).logits[:, 2:-1].log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    assert torch.isclose(names["loss"], expected, atol=1e-6)


def test_the_register_is_that_of_the_record():
    page = (ROOT / "nbs" / "results" / "claims.md").read_text(encoding="utf-8")
    assert page == readme_module.claims_page(open_book()), AGAIN
    verdicts = sum(
        len(read_json(path)["verdicts"])
        for path in (ROOT / "data" / "expected" / "cpu-full").glob("*.json")
    )
    assert page.split("## The register")[1].count("\n| [") >= verdicts > 0


def test_a_finding_without_its_verdict_is_an_error():
    words = "step-by-step beats standard finetuning (nli)"
    finding = readme_module.Finding("x", "stepwise_data_efficiency", words, "y")
    assert "15.7 [9.2, 22.0] points, 5 seeds" in readme_module.findings_list(open_book(), [finding])
    lost = readme_module.Finding("x", "stepwise_data_efficiency", "no such claim", "y")
    with pytest.raises(UserError, match="no recorded verdict 'no such claim'"):
        readme_module.findings_list(open_book(), [lost])
