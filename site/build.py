"""Build the site: the book in its order, the results, the solutions, and pages about the library.

    python site/build.py [folder]      # default: build/site; the pages are in folder/html

The notebooks are shown with their committed outputs. A warning of Sphinx, such as a link that leads nowhere, ends the build.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from api import anchor, api_pages

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kd_notes.runner.notebooks import open_book  # noqa: E402
from kd_notes.runner.order import read_order  # noqa: E402
from kd_notes.runner.readme import NOTE  # noqa: E402

FIRST_PAGES = ["nbs/notation.md", "nbs/glossary.md"]
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def directives(source: str) -> tuple[list[str], str]:
    "Split nbdev's directives from the code of a cell."
    found = re.findall(r"(?m)^#\| *(.*)$", source)
    return found, re.sub(r"(?m)^#\|.*\n?", "", source).strip("\n")


def staged_code(cell: dict, modules: set[str], folded: bool) -> dict | None:
    """Return a code cell for the site, or a line about the module in place of nbdev's directive.

    The code of a page with results is `folded`: its readers come for what was found.
    """
    found, code = directives("".join(cell["source"]))
    for directive in found:
        if match := re.match(r"default_exp (\S+)", directive):
            page, text = match[1].split(".")[0], f"`kd_notes.{match[1]}`"
            if match[1] in modules:
                text = f"[{text}](/api/{page}.md#{anchor(match[1])})"
            line = f"This lesson defines the module {text}."
            return {"cell_type": "markdown", "metadata": {}, "id": cell["id"], "source": line}
    if not code:
        return None
    tags = [tag.replace("_", "-") for tag in cell["metadata"].get("tags", [])]
    if "hide" in found:
        tags.append("hide-cell")
    elif folded:
        tags.append("hide-input")
    metadata = {"tags": tags}
    described = [
        facts["alt"]
        for output in cell["outputs"]
        for facts in output.get("metadata", {}).values()
        if isinstance(facts, dict) and "alt" in facts
    ]
    if described:
        metadata["mystnb"] = {"image": {"alt": " ".join(described)}}
    return cell | {"source": code, "metadata": metadata}


def staged_prose(cell: dict, path: Path) -> dict:
    "Return a cell of prose for the site: the front page of the repository is that of the site."
    home = os.path.relpath(ROOT / "index.md", path.parent)

    def target(link: re.Match) -> str:
        return link[1] + re.sub(r"^(\.\./)*index\.ipynb", home, link[2]) + link[3]

    text = "".join(cell["source"])
    return cell | {"source": LINK.sub(target, text)}


def stage_notebook(path: Path, source: Path, modules: set[str]) -> None:
    "Write the notebook as the site shows it."
    nb = json.loads(path.read_text(encoding="utf-8"))
    folded = path.parent.name == "results"
    cells = [
        staged_code(cell, modules, folded)
        if cell["cell_type"] == "code"
        else staged_prose(cell, path)
        for cell in nb["cells"]
    ]
    nb["cells"] = [cell for cell in cells if cell]
    place = source / path.relative_to(ROOT)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(nb), encoding="utf-8")


def book_notebooks() -> list[Path]:
    "Return the notebooks of the site: lessons, results and solutions, without drafts."
    nbs = ROOT / "nbs"
    found = [*nbs.glob("[0-9]_*/*.ipynb"), *nbs.glob("results/*.ipynb")]
    found += nbs.glob("solutions/*/*.ipynb")
    return sorted(path for path in found if not path.name.startswith(("_", ".")))


def other_pages() -> list[str]:
    "Return the pages of prose beside the notebooks, such as the data card and the course plans."
    named = ["CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"]
    found = [*(ROOT / "nbs").glob("*.md"), *(ROOT / "nbs" / "results").glob("*.md")]
    pages = sorted(path.relative_to(ROOT).as_posix() for path in found)
    return [page for page in pages if page not in FIRST_PAGES] + named


def toctree(caption: str, pages: list[str]) -> str:
    lines = "\n".join(pages)
    return f"```{{toctree}}\n:caption: {caption}\n:hidden:\n:maxdepth: 1\n\n{lines}\n```"


def without_folders(text: str, folder: Path) -> str:
    "Let a link to a folder lead to its README, or to the first of its lessons; a site shows no folders."
    lessons = [lesson.name for part in read_order(open_book(ROOT)) for lesson in part.lessons]

    def target(link: re.Match) -> str:
        place = Path(os.path.normpath(folder / link[2]))
        if not place.is_dir() or place == ROOT:
            return link[0]
        page = place / "README.md"
        if not page.is_file():
            page = next(ROOT / "nbs" / f"{n}.ipynb" for n in lessons if n.startswith(place.name))
        return link[1] + os.path.relpath(page, folder) + link[3]

    return LINK.sub(target, text)


def front_page(api: list[str]) -> str:
    "Return the front page: the README, and the order of all pages."
    text = (ROOT / "README.md").read_text(encoding="utf-8").removeprefix(NOTE)
    text = without_folders(text.replace("](nbs/index.ipynb", "](index.md"), ROOT)
    first = [page.removesuffix(".md") for page in FIRST_PAGES]
    trees = [toctree("Before you begin", first)]
    for part in read_order(open_book(ROOT)):
        pages = [f"nbs/{lesson.name}" for lesson in part.lessons]
        trees.append(toctree(part.title, pages + [f"nbs/results/{name}" for name in part.results]))
    trees.append(toctree("The library", [f"api/{page}" for page in api]))
    about = ["solutions", *(page.removesuffix(".md") for page in other_pages())]
    trees.append(toctree("About", about))
    return "\n\n".join([text, *trees]) + "\n"


def solutions_page() -> str:
    "Return the page that lists the solutions, so that they do not fill the contents of every page."
    names = [path.relative_to(ROOT) for path in book_notebooks() if "solutions" in path.parts]
    lines = "\n".join(path.with_suffix("").as_posix() for path in names)
    return f"# Solutions\n\nAnswers that run.\n\n```{{toctree}}\n:maxdepth: 1\n\n{lines}\n```\n"


def copy_linked_files(source: Path) -> None:
    "Copy what pages link to or show, and is no page itself: pictures, data, profiles."
    for page in sorted(source.rglob("*")):
        if page.suffix not in (".md", ".ipynb"):
            continue
        text = page.read_text(encoding="utf-8")
        if page.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        for _, target, _ in LINK.findall(text):
            place = Path(os.path.normpath(page.parent / target.split("#")[0]))
            if re.match(r"[a-z]+:|#|/", target) or place.exists():
                continue
            original = ROOT / os.path.relpath(place, source)
            if original.is_file() and original.suffix not in (".md", ".ipynb"):
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(original, place)


def stage(source: Path) -> None:
    "Lay out all pages in a fresh folder."
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    api = api_pages(ROOT / "kd_notes")
    modules = {
        module for page in api.values() for module in re.findall(r"(?m)^## kd_notes\.(\S+)", page)
    }
    for path in book_notebooks():
        stage_notebook(path, source, modules)
    for name in [*FIRST_PAGES, *other_pages()]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text(encoding="utf-8")
        (source / name).write_text(without_folders(text, (ROOT / name).parent), encoding="utf-8")
    (source / "api").mkdir()
    for page, text in api.items():
        (source / "api" / f"{page}.md").write_text(text, encoding="utf-8")
    (source / "solutions.md").write_text(solutions_page(), encoding="utf-8")
    (source / "index.md").write_text(front_page(list(api)), encoding="utf-8")
    copy_linked_files(source)


def build(folder: Path) -> Path:
    "Build the site in `folder`; return the folder of its pages."
    source, html = folder / "source", folder / "html"
    stage(source)
    shutil.rmtree(html, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-j", "2"]
    command += [
        "-c",
        str(Path(__file__).parent),
        "-d",
        str(folder / "trees"),
        str(source),
        str(html),
    ]
    subprocess.run(command, check=True)
    for path in book_notebooks():  # the download is the notebook of the repository
        shutil.copy(path, html / "_sources" / path.relative_to(ROOT))
    return html


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "site")
    print(build(parser.parse_args().folder.resolve()))
