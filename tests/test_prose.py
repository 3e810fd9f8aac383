"""Spelling, and the kinds of sentence that a native reader stumbled over."""

import re
import subprocess
import sys

import pytest
from prose import cells, everything, is_stage_direction, notebooks, ROOT, without_code

PROSE = dict(everything())

# Words that the dictionary of misspellings takes for others: the metric, and a unit of text.
OURS = "tracin,rouge"

# Each kind: a pattern, and a sentence that it has to find.
BANNED = {
    "an inverted predicate": (
        r"(?:^|[.:;!?] )(?:Exact|Needed|Missing|Certain|Decisive|Wrong|Right|New|Good) (?:is|are)\b",
        "Exact is, for this reward, the product of the ratios.",
    ),
    "'who' without a person": (
        r"(?:^|[.:;!?] )Who(?:ever)? (?:would|wants|needs|uses|writes|reads|is told|looks)\b[^?]*?[.:;]",
        "Who would rather go on gives a floor.",
    ),
    "'would rather'": (r"\bwould rather\b", "The reader would rather go on."),
    "'shall'": (r"\bshall\b", "The student shall write 22."),
    "the hour of a lecture": (
        r"\bof the (?:first|last) hour\b",
        "The other two of the first hour.",
    ),
    "'find back'": (r"\bfinds? back\b", "All it has to do is to find back."),
    "a promise that code keeps": (r"\bkeeps? (?:its|their) word\b", "It cannot keep its word."),
    "'silence' for a weight of zero": (
        r"\bsilences?\s+(?:its|the|his|one)\b",
        "A weight of 0 must silence its half.",
    ),
    "'nothing much'": (r"\bnothing much\b", "It gains nothing much."),
    "'stands in', 'stands there'": (
        r"\bstands? (?:there|on it)\b|\bstands? in (?!for\b)",
        "The number stands in the table.",
    ),
    "'beside it stand'": (r"\b[Bb]eside (?:it|them) stands?\b", "Beside it stand the others."),
    "trained by nobody": (r"\bby nobody\b|\bNobody writes\b", "Two rows are trained by nobody."),
    "an announcement of the public name": (r"(?:^|[.:] )In public\b", "In public, half and half:"),
    "'the true value, so it is what you get'": (
        r"\bso (?:it|that) is what you get\b",
        "That is the true value, so it is what you get.",
    ),
    "filler": (
        r"(?i)\bneedless to say\b|\bit should be noted\b|\bit is (?:important|worth) (?:to note|noting)\b"
        r"|\bin order to\b|\bas you can see\b|\bobviously\b|\bin this section,? we\b",
        "It should be noted that this is obviously so.",
    ),
    "fashion": (
        r"(?i)\bdelv(?:e|es|ing)\b|\bleverag(?:e|es|ing)\b|\butili[sz](?:e|es|ing)\b|\bseamless"
        r"|\bcutting-edge\b|\bgame-chang",
        "We leverage the teacher.",
    ),
    "American spelling": (
        r"(?i)\b(?:optimizer|behavior|color|normalize|normalization|summarize|recognize|analyze|labeled)s?\b",
        "The optimizer normalizes.",
    ),
    "a number from memory": (
        r"(?i)\(from memory\)|\bquoted from memory\b(?<!is quoted from memory)",
        "88 % (from memory)",
    ),
}


def found(kind: str, text: str) -> list[str]:
    "The places of a kind of sentence in a text, with their surroundings."
    text = " ".join(text.split())
    places = re.finditer(BANNED[kind][0], text)
    return [text[max(0, at.start() - 40) : at.end() + 40] for at in places]


def test_all_of_the_book_is_read():
    assert len(PROSE) > 300 and sum(len(text.split()) for text in PROSE.values()) > 150_000
    assert "nbs/results/claims.md" in PROSE and "kd_notes/core.py" in PROSE


@pytest.mark.parametrize("kind", BANNED)
def test_no_sentence_of_a_banned_kind(kind):
    texts = PROSE
    if kind == "American spelling":  # torch's names are American, and docstrings speak of them
        texts = {name: text for name, text in PROSE.items() if not name.endswith(".py")}
    wrong = {name: places for name, text in texts.items() if (places := found(kind, text))}
    assert not wrong, f"{kind}: {wrong}"


@pytest.mark.parametrize("kind", BANNED)
def test_each_kind_is_found(kind):
    assert found(kind, without_code(f"Before.\n\n{BANNED[kind][1]}\n"))
    assert not found(kind, without_code(f"`{BANNED[kind][1]}`"))


def test_no_cell_is_a_stage_direction():
    wrong = {
        path.relative_to(ROOT).as_posix(): lines
        for path in notebooks()
        if (lines := [cell for cell in cells(path) if is_stage_direction(cell)])
    }
    assert not wrong, f"Say what is to be seen, or say nothing: {wrong}"


def test_a_stage_direction_is_found():
    assert is_stage_direction("And the sums:\n") and is_stage_direction("No option here:")
    assert not is_stage_direction("A weight of 0 must remove its half, even where it is infinite:")
    assert not is_stage_direction("## Exercises")


def misspelt(texts: dict[str, str], folder) -> list[str]:
    "Common misspellings in the texts, a line each: the dictionary of codespell, without a network."
    for name, text in texts.items():
        (folder / f"{name.replace('/', '+')}.txt").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "codespell_lib", "--builtin", "clear,rare,informal"]
    done = subprocess.run(
        [*command, "--ignore-words-list", OURS, "."], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode in (0, 65), done.stderr  # 65: it found some
    return [line.removeprefix("./").replace("+", "/") for line in done.stdout.splitlines()]


def test_spelling(tmp_path):
    pytest.importorskip("codespell_lib", reason="the extra `dev` is not installed")
    assert not (wrong := misspelt(PROSE, tmp_path)), "\n".join(wrong)


def test_a_misspelling_is_found(tmp_path):
    pytest.importorskip("codespell_lib", reason="the extra `dev` is not installed")
    wrong = misspelt({"a/b.md": "The teh\nwhich recieves Rouge."}, tmp_path)
    assert [line.split(":")[:2] for line in wrong] == [["a/b.md.txt", "1"], ["a/b.md.txt", "2"]]
