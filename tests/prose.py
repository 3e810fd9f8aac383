"""The prose of the book, for the tests that read it: Markdown cells, Markdown files and docstrings, without code and formulas."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What is no English: blocks and spans of code, formulas, addresses, HTML tags, targets of links.
NO_PROSE = re.compile(
    r"```.*?```|~~~.*?~~~|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$|\]\([^)\s]*\)|https?://\S+|<[^>\n]+>",
    re.S,
)
# What a reader of one cell would call a stage direction: "In public:"
FEW_WORDS = 5


def notebooks() -> list[Path]:
    "Index, lessons, results and solutions, without drafts."
    found = [ROOT / "nbs" / "index.ipynb", *(ROOT / "nbs").glob("[0-9]_*/*.ipynb")]
    found += [*(ROOT / "nbs" / "results").glob("*.ipynb")]
    found += (ROOT / "nbs" / "solutions").glob("*/*.ipynb")
    return sorted(path for path in found if not path.name.startswith(("_", ".")))


def pages() -> list[Path]:
    "Markdown files of the project."
    found = [
        *ROOT.glob("*.md"),
        *(ROOT / "nbs").glob("*.md"),
        *(ROOT / "nbs" / "results").glob("*.md"),
    ]
    return sorted([*found, ROOT / "data" / "README.md"])


def without_code(text: str) -> str:
    "The text with a blank in place of code and formulas; lines keep their numbers."
    return NO_PROSE.sub(lambda found: " … " + "\n" * found[0].count("\n"), text)


def cells(path: Path) -> list[str]:
    "The Markdown cells of a notebook."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "markdown"]


def docstrings(path: Path) -> list[str]:
    "The docstrings of a module, its classes and its functions."
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, kinds))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def everything() -> Iterator[tuple[str, str]]:
    "(where, prose) of every notebook, Markdown file and module."
    for path in notebooks():
        yield path.relative_to(ROOT).as_posix(), without_code("\n\n".join(cells(path)))
    for path in pages():
        yield path.relative_to(ROOT).as_posix(), without_code(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "kd_notes").rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), without_code("\n\n".join(docstrings(path)))


def is_stage_direction(cell: str) -> bool:
    "Whether a cell only announces the next one, in a few words and with a colon."
    return cell.rstrip().endswith(":") and len(cell.split()) <= FEW_WORDS
