"""How dense the exported code is: tokens a line, line lengths, public names. `python tests/style.py [module ...]` prints a table."""

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "kd_notes"
NOT_COUNTED = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def docstring_lines(tree: ast.Module) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def exported_list(tree: ast.Module) -> set[int]:
    "Lines of __all__, which nbdev writes."
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(range(node.lineno, node.end_lineno + 1))
    return set()


def public_names(path: Path) -> list[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def measure(path: Path) -> dict[str, list[int]]:
    "Tokens and columns of each line of code: without docstrings, comments, blank lines and __all__."
    text = path.read_text()
    tree = ast.parse(text)
    left_out = docstring_lines(tree) | exported_list(tree)
    tokens: Counter = Counter()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_COUNTED:
            tokens[token.start[0]] += 1
    lines = text.splitlines()
    code = [number for number in tokens if number not in left_out]
    return {
        "tokens": [tokens[number] for number in code],
        "columns": [len(lines[number - 1]) for number in code],
    }


def summary(paths: list[Path]) -> dict[str, float]:
    measured = [measure(path) for path in paths]
    tokens = [t for m in measured for t in m["tokens"]]
    columns = [c for m in measured for c in m["columns"]]
    return {
        "lines": len(tokens),
        "tokens a line": statistics.mean(tokens),
        "over 100 columns": sum(c > 100 for c in columns) / len(columns),
        "public names": sum(len(public_names(path)) for path in paths),
    }


def main() -> None:
    chosen = [
        p for p in modules() if not sys.argv[1:] or any(a in p.as_posix() for a in sys.argv[1:])
    ]
    for path in [*([p] for p in chosen), chosen]:
        s = summary(path)
        title = path[0].relative_to(PACKAGE).as_posix() if len(path) == 1 else "all of these"
        print(
            f"{title:40} {s['lines']:6} lines {s['tokens a line']:5.1f} tokens a line "
            f"{100 * s['over 100 columns']:5.1f} % over 100 columns {s['public names']:4} public names"
        )


if __name__ == "__main__":
    main()
