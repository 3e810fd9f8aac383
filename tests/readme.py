"""README.md from nbs/index.ipynb, without quarto (which nbdev_readme would need): `make readme` runs this file, test_readme.py compares."""

import argparse
import os
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Generated from nbs/index.ipynb by `make readme`. Do not edit. -->\n\n"


def execute(nbs: Path) -> nbformat.NotebookNode:
    "The index with fresh outputs, run in the folder `nbs`; nothing but `nbs`/images is written."
    from nbclient import NotebookClient

    nb = nbformat.read(nbs / "index.ipynb", as_version=4)
    NotebookClient(nb, timeout=120, resources={"metadata": {"path": str(nbs)}}).execute()
    return nb


def from_root(target: str) -> str:
    "A link as seen from nbs/, rewritten for a file in the folder above."
    if re.match(r"[a-z]+:|#", target):
        return target
    return os.path.normpath(f"nbs/{target}").replace(os.sep, "/")


def convert(nb: nbformat.NotebookNode) -> str:
    "The text of README.md: markdown and outputs, without the cells tagged `remove_input`."
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    config = Config(
        {"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"remove_input"}}}
    )
    body, _ = MarkdownExporter(config=config).from_notebook_node(nb)
    linked = re.sub(r"\]\(([^)\s]+)\)", lambda m: f"]({from_root(m[1])})", body)
    return NOTE + re.sub(r"\n{3,}", "\n\n", linked).strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--no-execute", action="store_true", help="convert the committed outputs as they are"
    )
    if not parser.parse_args().no_execute:
        nb = execute(ROOT / "nbs")
        nbformat.write(nb, ROOT / "nbs" / "index.ipynb")
        from nbdev.clean import nbdev_clean

        nbdev_clean(str(ROOT / "nbs" / "index.ipynb"))
    text = convert(nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4))
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
