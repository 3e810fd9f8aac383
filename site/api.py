"""Pages about the library, from its source: signatures with the comments of their parameters, and docstrings."""

import ast
import re
from pathlib import Path


def escaped(text: str) -> str:
    "Return a docstring as Markdown: what stands in backticks is code, the rest is plain text."
    parts = re.split(r"(`[^`\n]+`)", text)
    plain = [re.sub(r"([\\*_\[\]<>$|#~])", r"\\\1", part) for part in parts[::2]]
    return "".join(a + b for a, b in zip(plain, [*parts[1::2], ""]))


def body_start(node: ast.AST) -> int:
    "Return the line (from 0) at which the body of a function or class begins, without its docstring."
    return node.body[0].lineno - 1


def signature(node: ast.AST, lines: list[str]) -> str:
    "Return the source of a definition down to its docstring; of a class, its fields as well."
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return "\n".join(lines[first : min(node.end_lineno, first + 12)])
    header = lines[first : body_start(node)]
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        header += [line for n in fields for line in lines[n.lineno - 1 : n.end_lineno]]
    return "\n".join(header).rstrip()


def names_of(node: ast.stmt) -> list[str]:
    "Return the names that a statement of a module defines."
    if isinstance(node, ast.Assign):
        return [
            n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)
        ]
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    return [node.name] if hasattr(node, "name") else []


def module_section(path: Path, module: str) -> str:
    "Return the section about a module, or an empty text if it has no public names."
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    nodes = {name: node for node in tree.body for name in names_of(node)}
    public = ast.literal_eval(nodes["__all__"].value) if "__all__" in nodes else []
    if not public:
        return ""
    notebook = re.search(r"File to edit: (?:\.\./)+(nbs/\S+\.ipynb)", text)[1]
    parts = [f"({anchor(module)})=\n## kd_notes.{module}"]
    parts.append(f"{escaped(ast.get_docstring(tree) or '')}. [The lesson](../{notebook})")
    for name in public:
        node = nodes[name]
        parts.append(f"### {escaped(name)}\n\n```python\n{signature(node, lines)}\n```")
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            parts.append(escaped(ast.get_docstring(node) or ""))
    return "\n\n".join(parts)


def anchor(module: str) -> str:
    return "module-" + module.replace(".", "-").replace("_", "-")


def api_pages(package: Path) -> dict[str, str]:
    "Return {page: Markdown}, a page for each package or module at the top of the library."
    pages: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        if path.name not in ("__init__.py", "_modidx.py"):
            module = ".".join(path.relative_to(package).with_suffix("").parts)
            if section := module_section(path, module):
                pages.setdefault(module.split(".")[0], []).append(section)
    return {
        page: f"# kd_notes.{page}\n\n" + "\n\n".join(sections) + "\n"
        for page, sections in pages.items()
    }
