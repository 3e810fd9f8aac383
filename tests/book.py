"""How the book reads, in numbers: `python tests/book.py` prints them, test_book.py holds their bounds."""

import ast
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from kd_notes.runner.notebooks import open_book  # noqa: E402
from kd_notes.runner.order import read_order  # noqa: E402

# Code that computes a KL divergence, and code after which a student has learnt from a teacher.
KL = re.compile(r"\bkl_div\(|\b(?:forward|reverse)_kl\(")
DISTILLED = re.compile(r"\bfit\(network\(.*targets, temperature\)|\btrain\(.*signal\)", re.S)


def load(path: Path) -> list[dict]:
    "The cells of a notebook, with their source as one string."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def in_order() -> list[Path]:
    "The lessons, as the book puts them."
    parts = read_order(open_book(ROOT))
    return [ROOT / "nbs" / f"{lesson.name}.ipynb" for part in parts for lesson in part.lessons]


def results() -> list[Path]:
    return sorted((ROOT / "nbs" / "results").glob("*.ipynb"))


def cells_until(pattern: re.Pattern) -> int:
    "Cells that a reader of the book meets up to the first code cell with the pattern."
    met = 0
    for path in in_order():
        for cell in load(path):
            met += 1
            if cell["cell_type"] == "code" and pattern.search(cell["source"]):
                return met
    raise ValueError(f"no cell has {pattern.pattern}")


def code_lengths(paths: list[Path]) -> list[int]:
    "Lines of each code cell that a reader sees, every line counted."
    cells = [cell for path in paths for cell in load(path) if cell["cell_type"] == "code"]
    return [len(c["source"].splitlines()) for c in cells if not c["source"].startswith("#| hide")]


def calls(code: str) -> dict[str, list[set[str]]]:
    "{function: keywords of each of its calls} in the code of a cell."
    plain = re.sub(r"(?m)^[ \t]*[%!].*$", "pass", code)
    found: dict[str, list[set[str]]] = {}
    for node in ast.walk(ast.parse(plain)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            found.setdefault(name, []).append({str(keyword.arg) for keyword in node.keywords})
    return found


def figures(code: str) -> list[bool]:
    "For each figure that a cell saves: whether it has a title of its own, which says what was found."
    called = calls(code)
    drawn = "suptitle" in called or any("title" in k for k in called.get("accuracy_curve", []))
    return [drawn or "title" in keywords for keywords in called.get("save_figure", [])]


def measures() -> dict[str, float]:
    lengths = sorted(code_lengths([*in_order(), *results()]))
    code = [
        cell["source"] for path in results() for cell in load(path) if cell["cell_type"] == "code"
    ]
    titled = [with_title for text in code for with_title in figures(text)]
    columns = [
        len(line)
        for path in [*in_order(), *results()]
        for cell in load(path)
        if cell["cell_type"] == "code"
        for line in cell["source"].splitlines()
    ]
    return {
        "cells to the first KL": cells_until(KL),
        "cells to the first distilled model": cells_until(DISTILLED),
        "lines of a code cell, median": statistics.median(lengths),
        "lines of a code cell, 90th percentile": lengths[int(0.9 * len(lengths))],
        "lines of a code cell, longest": lengths[-1],
        "share of code lines over 100 columns": sum(c > 100 for c in columns) / len(columns),
        "figures of the results": len(titled),
        "share of these with a finding as title": statistics.mean(titled),
    }


if __name__ == "__main__":
    for name, value in measures().items():
        print(f"{name:42} {value:g}")
