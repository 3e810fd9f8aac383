"""Execute lessons and name the cells whose stored text is not today's; with --write, store it.

python tests/outputs.py [--write] nbs/3_reasons/06_filters.ipynb ...

Numbers are not compared, since many are times, and hidden cells have no outputs.
"""

import json
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HIDDEN = ("#| hide", "#| export")
PROGRESS = re.compile(r"\d+%\||\d+/\d+ \w+ in ")  # of bars, and of the package's own lines


def is_compared(cell: dict) -> bool:
    "Whether the outputs of a cell are stored."
    if cell["cell_type"] != "code" or "skip-execution" in cell["metadata"].get("tags", []):
        return False
    return not "".join(cell["source"]).lstrip().startswith(HIDDEN)


def shown(output: dict) -> str:
    "Return the text of an output, and <image> for a picture."
    data = output.get("data", {})
    if any(kind.startswith("image/") for kind in data):
        return "<image>"
    return "".join(output.get("text", data.get("text/plain", "")))


def kept_outputs(outputs: list[dict]) -> list[dict]:
    "Return the outputs that belong on the page: no warnings and no progress."
    kept = []
    for output in outputs:
        if output.get("name") != "stderr" and not PROGRESS.search(shown(output)):
            kept.append(
                {**output, "execution_count": None} if "execution_count" in output else output
            )
    return kept


def comparable(outputs: list[dict]) -> str:
    "Return the text of outputs without numbers, places and white space."
    text = " ".join(shown(output) for output in outputs)
    text = re.sub(r"/tmp/\S+", "", text)
    return re.sub(r"[\d.,]+|\s+", " ", text).strip()


def refresh(path: Path, write: bool) -> list[str]:
    "Return the ids of the cells whose stored text is another one; store today's if `write`."
    stored = json.loads(path.read_text(encoding="utf-8"))
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if "skip-execution" in cell.metadata.get("tags", []):
            cell.source = ""
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    changed = []
    for old, new in zip(stored["cells"], json.loads(nbformat.writes(notebook))["cells"]):
        if not is_compared(old):
            continue
        outputs = kept_outputs(new["outputs"])
        if comparable(outputs) != comparable(old["outputs"]):
            changed.append(old["id"])
            old["outputs"] = outputs
    if write and changed:
        text = json.dumps(stored, ensure_ascii=False, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    return changed


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:] if name != "--write"]
    stale = {str(path): refresh(path, "--write" in sys.argv) for path in paths}
    for name, cells in stale.items():
        print(name, *cells or ["as stored"])
    sys.exit(any(stale.values()) and "--write" not in sys.argv)
