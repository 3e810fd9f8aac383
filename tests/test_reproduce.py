"""The runner with real papermill, real processes and real kills, on small notebooks made for the purpose."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

import kd_notes.cli as cli_module
import kd_notes.data.examples as examples_module
import kd_notes.runner.execute as execute_module
import kd_notes.runner.notebooks as notebooks_module
import kd_notes.runner.profiles as profiles_module
import kd_notes.runner.publish as publish_module
import kd_notes.methods.rationales as rationales_module
import kd_notes.runner.record as record_module
import kd_notes.runner.reproduce as reproduce_module
from kd_notes.core import read_json, stable_hash, UserError, write_json
from kd_notes.runner.grid import load_record, record_runs, run_grid
from kd_notes.runner.profiles import plain_settings
from kd_notes.runner.runs import read_manifest, run_status

PARAMETERS = '''a = 2            # a whole number
scale = 0.5      # a decimal number
names = ["x"]    # a list of texts
jobs = 1         # processes
run_dir = "../../runs/reader/small"'''
ECHO = "from kd_notes.runner.notebooks import echo\nparams = echo(dict(a=a, scale=scale, names=names, jobs=jobs), run_dir)"
WORK = """from kd_notes.core import write_json
number = {"value": a * scale, "low": a * scale - 0.1, "high": a * scale + 0.1, "n": 5}
write_json(f"{run_dir}/metrics.json", {"gain": number, "a": a})"""
FIGURE = """from pathlib import Path
Path(run_dir, "curve.csv").write_text("x,y\\n1,2\\n")
Path(run_dir, "curve.png").write_bytes(b"\\x89PNG")
print("drawn in", run_dir)"""
REAL_FIGURE = """from kd_notes.evaluation.figures import accuracy_curve, save_figure
rows = [{"arm": arm, "x": x, "value": v, "low": v - 0.05, "high": v + 0.05, "n": 5} for arm in ("one", "two") for x, v in ((250, 0.4), (500, 0.5))]
print("drawn in", run_dir)
save_figure(accuracy_curve(rows, teacher=0.8), run_dir, "curve", rows, alt="two arms")"""


def code(text: str, **metadata) -> dict:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": f"c{stable_hash(text)[:7]}",
        "metadata": metadata,
        "outputs": [],
        "source": text.splitlines(True),
    }


def prose(text: str) -> dict:
    return {
        "cell_type": "markdown",
        "id": f"m{stable_hash(text)[:7]}",
        "metadata": {},
        "source": text.splitlines(True),
    }


def notebook(*cells: dict) -> dict:
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return {
        "cells": list(cells),
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def standard(
    *more: str,
    parameters: str = PARAMETERS,
    echo: str = ECHO,
    work: str = WORK,
    figure: str = FIGURE,
) -> dict:
    "A results notebook that does everything right, unless a part is replaced."
    cells = [
        prose("# Small\n"),
        code(parameters, tags=["parameters"]),
        code(echo),
        *(code(m) for m in more),
        code(work),
        code(figure),
    ]
    return notebook(*cells, prose("## Exercises\n"))


def make_book(root: Path, profiles: dict | None = None, **notebooks: dict) -> notebooks_module.Book:
    (root / "nbs" / "results").mkdir(parents=True, exist_ok=True)
    (root / "data").mkdir(exist_ok=True)
    for name, nb in notebooks.items():
        (root / "nbs" / "results" / f"{name}.ipynb").write_text(publish_module.notebook_text(nb))
    default = {"headline": sorted(notebooks), "seconds": dict.fromkeys(notebooks, 3)}
    for name, fields in (profiles or {"smoke": default}).items():
        write_json(root / "nbs" / "profiles" / f"{name}.json", fields)
    return notebooks_module.open_book(root)


def cli(book: notebooks_module.Book, *words: str, **env: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-c",
        "from kd_notes.cli import app; app()",
        *words,
        "--root",
        str(book.nbs.parent),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | env, timeout=120
    )


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("KD_NOTES_PROGRESS", "off")


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> notebooks_module.Book:
    "A book whose notebook was run and recorded once; tests copy it if they change it."
    os.environ["KD_NOTES_PROGRESS"] = "off"
    book = make_book(
        tmp_path_factory.mktemp("ran"),
        {
            "smoke": {
                "headline": ["small"],
                "seconds": {"small": 3},
                "parameters": {"small": {"a": 4}},
            }
        },
        small=standard(
            "import sys\nprint(sys.executable)\nprint('a warning', file=sys.stderr)",
            figure=REAL_FIGURE,
        ),
    )
    [outcome] = reproduce_module.reproduce(profile="smoke", jobs=2, book=book)
    assert outcome.status == "done", outcome.message
    record_module.record(["small"], "smoke", book)
    return book


@pytest.fixture
def copy(ran, tmp_path) -> notebooks_module.Book:
    "A copy of that book that a test may spoil."
    import shutil

    shutil.copytree(ran.nbs.parent, tmp_path / "book")
    return notebooks_module.open_book(tmp_path / "book")


# ---------------------------------------------------------------- parameters and profiles


@pytest.mark.parametrize(
    "text,message",
    [
        ('a = 1\nb = a * 2\nrun_dir = ""', "b = a \\* 2"),
        ('import os\nrun_dir = ""', "import os"),
        ('a, b = 1, 2\nrun_dir = ""', "a, b"),
        ('a = f"{1}"\nrun_dir = ""', "plain value"),
        ("a = 1", "no run_dir"),
        ("run_dir = None", "no run_dir"),
        ("a = = 1", "not Python"),
    ],
)
def test_parameters_cells_that_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        notebooks_module.notebook_parameters(notebook(code(text, tags=["parameters"])))


def test_the_tag_must_be_there_once():
    for cells in ([code(PARAMETERS)], [code(PARAMETERS, tags=["parameters"])] * 2):
        with pytest.raises(UserError, match="tag"):
            notebooks_module.notebook_parameters(notebook(*cells))


def test_parameters_are_read_with_types_and_help():
    found = notebooks_module.notebook_parameters(
        notebook(
            code(
                'n: int = -3  # how many # of them\nx = [1,\n  2]  # list\nt = "#no"\nrun_dir = "é"  # ü',
                tags=["parameters"],
            )
        )
    )
    assert {k: (p.default, p.help) for k, p in found.items()} == {
        "n": (-3, "how many # of them"),
        "x": ([1, 2], "list"),
        "t": ("#no", ""),
        "run_dir": ("é", "ü"),
    }


@pytest.mark.parametrize(
    "given,message",
    [
        ({"b": 1}, "Known parameters: a, scale, names"),
        ({"a": "2"}, "not of type int"),
        ({"a": True}, "int"),
        ({"a": 2.5}, "int"),
        ({"names": [1]}, "list of str"),
        ({"scale": math.nan}, "float"),
        ({"run_dir": "x"}, "runner"),
        ({"jobs": 3}, "runner"),
    ],
)
def test_unknown_and_ill_typed_parameters(given, message):
    known = notebooks_module.notebook_parameters(standard())
    with pytest.raises(UserError, match=message):
        notebooks_module.resolve_parameters(known, given, "here")


def test_a_whole_number_may_stand_for_a_decimal_one_with_the_same_key():
    known = notebooks_module.notebook_parameters(standard())
    one = notebooks_module.resolve_parameters(known, {"scale": 1}, "x")
    assert (
        stable_hash(one)
        == stable_hash(notebooks_module.resolve_parameters(known, {"scale": 1.0}, "x"))
        and type(one["scale"]) is float
    )


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"headlines": []}, "headlines"),
        ({"headline": "small"}, "headline"),
        ([], "one JSON object"),
        ({"headline": ["smal"]}, "'smal'"),
        ({"seconds": {"other": 1}}, "'other'"),
        ({"shared": {"small": {"other": 1}}}, "'other'"),
        ({"shared": {"small": 5}}, "'shared' has no notebooks for small"),
        ({"left_out": ["other"]}, "'other'"),
        ({"left_out": "small"}, "left_out"),
        ({"parameters": {"other": {}}}, "'other'"),
        ({"parameters": {"small": {"b": 1}}}, "Known parameters: a, scale, names"),
        ({"parameters": {"small": {"a": "x"}}}, "type int"),
    ],
)
def test_bad_profiles_name_the_file_and_the_known(tmp_path, fields, message):
    book = make_book(tmp_path, {"p": fields}, small=standard())
    with pytest.raises(UserError, match=message) as e:
        profiles_module.load_profile(book, "p")
    assert "p.json" in str(e.value)


def test_what_a_profile_leaves_out_runs_only_when_it_is_named(tmp_path, capsys):
    profile = {"left_out": ["slow"], "parameters": {"small": {"a": 2}}}
    book = make_book(tmp_path, {"p": profile}, small=standard(), slow=standard())
    ran = reproduce_module.reproduce(profile="p", everything=True, book=book)
    assert [outcome.name for outcome in ran] == ["small"]
    assert "left out unless named: slow" in capsys.readouterr().out
    ran = reproduce_module.reproduce(["slow"], profile="p", book=book)
    assert [outcome.name for outcome in ran] == ["slow"]
    assert "left out" not in capsys.readouterr().out


def test_a_profile_that_is_not_json_names_the_line(tmp_path):
    book = make_book(tmp_path, small=standard())
    (book.profiles / "p.json").write_text('{\n "headline": [\n')
    with pytest.raises(UserError, match="p.json:3"):
        profiles_module.load_profile(book, "p")


@pytest.mark.parametrize(
    "sets,made",
    [
        (["a=3"], {"one": {"a": 3}, "two": {"a": 3}}),
        (["one.a=3"], {"one": {"a": 3}, "two": {}}),
        (["names=['p', 'q']"], {"one": {"names": ["p", "q"]}, "two": {}}),
        (["text=3"], {"one": {}, "two": {"text": "3"}}),
        (["two.text=a=b.c"], {"one": {}, "two": {"text": "a=b.c"}}),
        (["flag=true"], {"one": {}, "two": {"flag": True}}),
        (["flag=False"], {"one": {}, "two": {"flag": False}}),
    ],
)
def test_settings_from_the_command_line(sets, made):
    known = {
        "one": {k: notebooks_module.Parameter(k, v) for k, v in {"a": 1, "names": ["x"]}.items()},
        "two": {
            k: notebooks_module.Parameter(k, v)
            for k, v in {"a": 1, "text": "", "flag": False}.items()
        },
    }
    assert profiles_module.parse_sets(sets, known) == made


@pytest.mark.parametrize("text", ["b=1", "three.a=1", "a", ""])
def test_settings_that_reach_nothing(text):
    with pytest.raises(UserError, match="Known: a"):
        profiles_module.parse_sets([text], {"one": {"a": notebooks_module.Parameter("a", 1)}})


# ---------------------------------------------------------------- a run


def test_a_run_leaves_a_readable_folder(ran):
    folder = ran.runs / "smoke" / "small"
    assert {
        "params.json",
        "manifest.json",
        "metrics.json",
        "curve.png",
        "curve.csv",
        "executed.ipynb",
        "log.txt",
    } <= {p.name for p in folder.iterdir()}
    assert read_json(folder / "params.json") == {"a": 4, "scale": 0.5, "names": ["x"]}
    assert read_json(folder / "metrics.json")["gain"]["value"] == 2.0
    manifest = read_manifest(folder)
    assert (
        manifest["status"] == "done"
        and manifest["kernel"]["device_class"] in ("cpu", "cuda")
        and manifest["kernel_peak_memory_mib"] > 10
    )
    assert (
        set(manifest["outputs"]) == {"metrics.json", "curve.png", "curve.csv"}
        and manifest["seconds"] > 0
    )
    assert not (folder / ".jupyter").exists()


def test_the_kernel_is_this_interpreter_and_jobs_arrive(ran):
    executed = notebooks_module.read_notebook(ran.runs / "smoke" / "small" / "executed.ipynb")
    texts = "".join(
        text for _, text in publish_module.output_text(notebooks_module.code_cells(executed))
    )
    assert sys.executable in texts
    assert read_json(ran.runs / "smoke" / "small" / "echo.json")["params"]["jobs"] == 2


def test_unchanged_is_skipped_without_importing_anything_heavy(ran):
    program = (
        "import sys, time; t = time.time(); from pathlib import Path; from kd_notes.runner.notebooks import open_book; from kd_notes.runner.reproduce import reproduce; "
        f"made = reproduce(profile='smoke', book=open_book(Path({str(ran.nbs.parent)!r}))); "
        "print([o.status for o in made], [m for m in ('torch', 'transformers', 'papermill', 'pandas', 'matplotlib') if m in sys.modules], time.time() - t)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("['unchanged'] []") and float(last.split()[-1]) < 5
    assert "1 unchanged, 0 to run" in done.stdout


def test_what_is_in_the_key_and_what_is_not(copy, monkeypatch):
    nb, params = notebooks_module.read_notebook(copy.results / "small.ipynb"), {"a": 4}
    key = notebooks_module.notebook_key(copy, nb, params)
    assert (
        notebooks_module.notebook_key(copy, {**nb, "cells": [*nb["cells"], prose("more")]}, params)
        == key
    )
    (copy.data / "README.md").write_text("prose")
    (copy.data / "expected" / "x.json").write_text("{}")
    assert notebooks_module.notebook_key(copy, nb, params) == key
    assert notebooks_module.notebook_key(copy, nb, {"a": 5}) != key
    assert (
        notebooks_module.notebook_key(copy, {**nb, "cells": [*nb["cells"], code("b = 1")]}, params)
        != key
    )
    (copy.data / "rows.jsonl").write_text("{}")
    assert notebooks_module.notebook_key(copy, nb, params) != key
    asked = []
    monkeypatch.setattr(
        notebooks_module, "code_hash", lambda *names: asked.append(names) or "other"
    )
    assert (
        notebooks_module.notebook_key(
            copy,
            notebook(
                code("from kd_notes.data.answers import accuracy\n%time\nimport kd_notes.core as r")
            ),
            params,
        )
        != key
    )
    assert asked == [("core", "data.answers")]


def test_real_data_outside_counts_only_for_those_who_read_it(copy, tmp_path, monkeypatch):
    reader, other = notebook(code("load_real('esnli', 'test')")), notebook(code("x = 1"))
    before = [notebooks_module.notebook_key(copy, nb, {}) for nb in (reader, other)]
    (tmp_path / "esnli.jsonl").write_text("{}")
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    after = [notebooks_module.notebook_key(copy, nb, {}) for nb in (reader, other)]
    assert before[0] != after[0] and before[1] == after[1]


def test_a_run_with_lost_or_changed_files_is_not_fresh(copy):
    folder = copy.runs / "smoke" / "small"
    key = read_manifest(folder)["key"]
    assert reproduce_module.run_fresh(folder, key) and not reproduce_module.run_fresh(
        folder, "0" * 16
    )
    (folder / "curve.png").write_bytes(b"other")
    assert not reproduce_module.run_fresh(folder, key)
    (folder / "curve.png").unlink()
    assert not reproduce_module.run_fresh(folder, key)


def test_failures_do_not_stop_the_others_and_say_why(tmp_path):
    book = make_book(
        tmp_path,
        aa=standard("def inner():\n    return {}['needle']\ninner()"),
        bb=standard(),
        cc=standard(
            "from kd_notes.core import UserError\nraise UserError('no rows', where='f.jsonl:3', fix='Add rows.')"
        ),
        dd=standard("import os\nos.kill(os.getpid(), 9)"),
    )
    done = cli(book, "reproduce", "--profile", "smoke")
    assert done.returncode == 1
    assert [run_status(book.runs / "smoke" / n) for n in ("aa", "bb", "cc", "dd")] == [
        "failed",
        "done",
        "failed",
        "failed",
    ]
    assert "KeyError" in done.stdout and "needle" in done.stdout and "inner()" in done.stdout
    assert "f.jsonl:3: no rows. Add rows." in done.stdout
    assert "kernel died" in done.stdout
    assert (
        "1 done, 3 failed" in done.stdout
        and "4 notebooks, 0 unchanged, 4 to run, about 12 s" in done.stdout
    )
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "parts,message",
    [
        ({"work": "pass"}, "no metrics.json"),
        ({"figure": "pass"}, "no figure"),
        ({"figure": FIGURE.replace("curve.csv", "other.csv")}, "curve.png without a CSV twin"),
        ({"work": WORK.replace('"a": a', '"a": "text"')}, "neither a finite number"),
        ({"echo": "params = {}"}, "did not echo"),
        ({"echo": "a = 3\n" + ECHO}, "a = 2 was sent, and the notebook echoes 3"),
        ({"echo": ECHO.replace("scale=scale, ", "")}, "scale = 0.5 was sent"),
    ],
)
def test_runs_that_ended_well_but_are_not_good(tmp_path, monkeypatch, parts, message):
    "The judgement after the run; the process itself is replaced by executing the cells here, the runs above were real."
    book = make_book(tmp_path, small=standard(**parts))

    def run_here(book, plan):
        space = {}
        exec(
            "\n".join(
                [f"{k} = {v!r}" for k, v in plan.sent.items()]
                + [
                    notebooks_module.cell_source(c)
                    for c in notebooks_module.code_cells(
                        notebooks_module.read_notebook(book.results / "small.ipynb")
                    )[1:]
                ]
            ),
            space,
        )
        return {"error": None, "peak_memory_mib": 1.0}

    monkeypatch.setattr(reproduce_module, "_run_process", run_here)
    [outcome] = reproduce_module.reproduce(profile="smoke", book=book)
    assert outcome.status == "failed" and message in outcome.message
    assert run_status(outcome.folder) == "failed"


def test_a_parameter_that_papermill_cannot_read_is_an_error(tmp_path):
    book = make_book(
        tmp_path,
        small=standard(
            parameters=PARAMETERS + '\nodd = "a=b"', echo=ECHO.replace("a=a", "a=a, odd=odd")
        ),
    )
    [outcome] = reproduce_module.reproduce(profile="smoke", book=book)
    assert outcome.status == "failed" and "papermill does not understand odd" in outcome.message


def test_settings_beside_the_profile_get_a_folder_of_their_own(copy):
    [outcome] = reproduce_module.reproduce(["small"], "smoke", sets=["a=7"], book=copy)
    assert outcome.status == "done" and outcome.folder.parent == copy.runs / "custom"
    assert (
        read_json(outcome.folder / "metrics.json")["a"] == 7
        and read_json(copy.runs / "smoke" / "small" / "metrics.json")["a"] == 4
    )
    assert [
        o.status
        for o in reproduce_module.reproduce(["small"], "smoke", sets=["small.a=7"], book=copy)
    ] == ["unchanged"]


def test_a_failed_rerun_keeps_the_last_good_run(copy):
    nb = notebooks_module.read_notebook(copy.results / "small.ipynb")
    (copy.results / "small.ipynb").write_text(
        publish_module.notebook_text({**nb, "cells": [*nb["cells"], code("1 / 0")]})
    )
    [outcome] = reproduce_module.reproduce(profile="smoke", book=copy)
    assert outcome.status == "failed" and "ZeroDivisionError" in outcome.message
    assert read_json(copy.runs / "smoke" / ".previous" / "small" / "metrics.json")["a"] == 4


def test_skipped_notebooks_are_neither_success_nor_failure(tmp_path):
    book = make_book(
        tmp_path,
        small=standard(
            "from kd_notes.runner.notebooks import skip\nskip('needs KD_NOTES_DATA', run_dir)"
        ),
    )
    done = cli(book, "reproduce", "--profile", "smoke")
    assert (
        done.returncode == 0
        and "small: skipped" in done.stdout
        and "needs KD_NOTES_DATA" in done.stdout
    )
    assert [(r.status, r.note[:19]) for r in record_module.check(profile="smoke", book=book)] == [
        ("NOT RUN", "nothing is recorded")
    ]
    with pytest.raises(UserError, match="no finished run"):
        record_module.record(["small"], "smoke", book)
    assert [o.status for o in reproduce_module.reproduce(profile="smoke", book=book)] == [
        "unchanged"
    ]


@pytest.mark.parametrize("name", ["my{b}ook", "{a}", "{{x}}", "half{open", "100% [x] \u00fc"])
def test_a_book_in_a_folder_with_an_odd_name(tmp_path, name):
    "Papermill fills parameters into the paths that it is given, and there is a parameter `a`."
    book = make_book(tmp_path / name, small=standard())
    [outcome] = reproduce_module.reproduce(profile="smoke", book=book)
    assert outcome.status == "done", outcome.message
    assert (tmp_path / name / "runs" / "smoke" / "small" / "executed.ipynb").is_file()


@pytest.mark.parametrize("last", ["os.kill(os.getpid(), 9)", "os._exit(0)", "os._exit(7)"])
def test_a_kernel_that_ends_by_itself_is_no_success(tmp_path, last):
    book = make_book(tmp_path, small=standard(f"import os\n{last}"))
    [outcome] = reproduce_module.reproduce(profile="smoke", book=book)
    assert outcome.status == "failed" and "kernel died" in outcome.message
    assert run_status(outcome.folder) == "failed"


ODD_TEXT = "C:\\new\\table 'single' \"double\" {braces} {a} 100 % = a=b \u00e9\u4e2d # no comment"


def test_a_text_parameter_arrives_letter_by_letter(tmp_path):
    parameters = PARAMETERS + '\nword = "x"  # a text'
    echoed = ECHO.replace("jobs=jobs", "jobs=jobs, word=word")
    book = make_book(tmp_path, small=standard(parameters=parameters, echo=echoed))
    [outcome] = reproduce_module.reproduce(
        profile="smoke", book=book, sets=[f"small.word={ODD_TEXT}"]
    )
    assert outcome.status == "done", outcome.message
    assert read_json(outcome.folder / "echo.json")["params"]["word"] == ODD_TEXT


def test_home_and_foreign_kernels_are_left_alone(tmp_path):
    "A kernel python3 in the home folder that would run something else is not used, and nothing is written to the home folder."
    home = tmp_path / "home"
    spec = home / ".local" / "share" / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    write_json(
        spec / "kernel.json",
        {"argv": ["/bin/false", "{connection_file}"], "display_name": "old", "language": "python"},
    )
    before = sorted(p for p in home.rglob("*"))
    book = make_book(tmp_path / "book", small=standard())
    done = cli(
        book,
        "reproduce",
        "--profile",
        "smoke",
        HOME=str(home),
        JUPYTER_PATH=str(home / ".local" / "share" / "jupyter"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p for p in home.rglob("*")) == before


# ---------------------------------------------------------------- interruptions

SLEEP = "import os, time\nopen(f'{run_dir}/pid', 'w').write(str(os.getpid()))\ntime.sleep(a)"


def start_and_wait_for_kernel(
    book: notebooks_module.Book, name: str = "slow"
) -> tuple[subprocess.Popen, int]:
    command = [
        sys.executable,
        "-c",
        "from kd_notes.cli import app; app()",
        "reproduce",
        "--profile",
        "smoke",
        "--root",
        str(book.nbs.parent),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = book.runs / "smoke" / name / "pid"
    limit = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < limit and process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process, int(pid.read_text())


def gone(pid: int, seconds: float = 15) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interruptions_leave_a_state_to_go_on_from(tmp_path, how):
    profile = {"headline": ["fast", "slow"], "parameters": {"slow": {"a": 300}}}
    book = make_book(tmp_path, {"smoke": profile}, fast=standard(), slow=standard(SLEEP))
    process, kernel = start_and_wait_for_kernel(book)
    assert run_status(book.runs / "smoke" / "slow") == "running"
    process.send_signal(how)
    out, err = process.communicate(timeout=30)
    assert gone(kernel)
    assert (
        run_status(book.runs / "smoke" / "slow") == "killed"
        and run_status(book.runs / "smoke" / "fast") == "done"
    )
    if how != signal.SIGKILL:
        assert (
            process.returncode == 130
            and "the same command goes on" in err
            and "Traceback" not in err
        )
    if how == signal.SIGTERM:
        return
    write_json(book.profiles / "smoke.json", {**profile, "parameters": {"slow": {"a": 0}}})
    assert [o.status for o in reproduce_module.reproduce(profile="smoke", book=book)] == [
        "unchanged",
        "done",
    ]


def test_two_runners_do_not_share_a_folder(tmp_path):
    book = make_book(
        tmp_path,
        {"smoke": {"headline": ["slow"], "parameters": {"slow": {"a": 300}}}},
        slow=standard(SLEEP),
    )
    process, kernel = start_and_wait_for_kernel(book)
    try:
        [outcome] = reproduce_module.reproduce(profile="smoke", book=book)
        assert outcome.status == "failed" and "another process" in outcome.message
        assert psutil.pid_exists(kernel)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert gone(kernel)


# ---------------------------------------------------------------- record and check


def with_numbers(book: notebooks_module.Book, change) -> None:
    "Change the recorded numbers honestly, that is with a digest that fits."
    path = record_module.expected_file(book, "smoke", "small")
    stored = read_json(path)
    change(stored["numbers"])
    write_json(path, stored | {"digest": record_module._digest(stored)})


def statuses(book: notebooks_module.Book) -> dict[str, str]:
    return {r.number: r.status for r in record_module.check(profile="smoke", book=book)}


def test_record_and_check_agree(ran):
    assert statuses(ran) == {"gain": "PASS", "a": "PASS"}
    stored = read_json(record_module.expected_file(ran, "smoke", "small"))
    assert (
        stored["device_class"] in ("cpu", "cuda")
        and stored["provenance"]["params"]["a"] == 4
        and stored["provenance"]["date"]
    )
    assert stored["numbers"]["gain"] == {"value": 2.0, "low": 1.9, "high": 2.1, "n": 5}
    assert stored["verdicts"] == [] and stored["provenance"]["source"] is None
    done = cli(ran, "check", "--profile", "smoke")
    assert done.returncode == 0 and "2 PASS, 0 DRIFT, 0 FAIL, 0 NOT RUN" in done.stdout


@pytest.mark.parametrize(
    "shift,status",
    [
        (0.1, "PASS"),
        (-0.1, "PASS"),
        (0.15, "DRIFT"),
        (-0.15, "DRIFT"),
        (0.31, "FAIL"),
        (-0.31, "FAIL"),
    ],
)
def test_tolerance_is_two_sided(copy, shift, status):
    def change(numbers):
        for part in ("value", "low", "high"):
            numbers["gain"][part] += shift  # the half width is 0.1

    with_numbers(copy, change)
    assert statuses(copy) == {"gain": status, "a": "PASS"}
    assert cli(copy, "check", "small", "--profile", "smoke").returncode == (
        1 if status == "FAIL" else 0
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n["gain"].update(n=3),
        lambda n: n["gain"].update(value=3.0, low=2.9, high=3.1),
        lambda n: n["gain"].update(value=-2.0, low=-2.1, high=-1.9),
        lambda n: n.update(extra={"value": 1.0, "abs": 1.0}),
        lambda n: n["a"].update(value=5),
    ],
)
def test_perturbed_expectations_fail(copy, change):
    with_numbers(copy, change)
    assert "FAIL" in statuses(copy).values()


VERDICTS = """from kd_notes.evaluation.statistics import Estimate, save_verdicts, verdict
save_verdicts([verdict("A beats B", Estimate(0.1, 0.05, 0.15, 5)), verdict("C beats B", Estimate(0.1, -0.05, 0.15, 5))], run_dir)"""


def test_verdicts_are_recorded_and_checked(tmp_path):
    book = make_book(tmp_path, small=standard(VERDICTS))
    [outcome] = reproduce_module.reproduce(profile="smoke", book=book)
    assert outcome.status == "done", outcome.message
    assert "verdicts.json" in read_manifest(outcome.folder)["outputs"]
    lines = record_module.record(["small"], "smoke", book)
    assert "small: verdict 'A beats B': new -> supported" in lines
    assert statuses(book)["verdict: A beats B"] == "PASS"
    path = record_module.expected_file(book, "smoke", "small")
    stored = read_json(path)

    def with_verdicts(*rows):
        changed = stored | {"verdicts": list(rows)}
        write_json(path, changed | {"digest": record_module._digest(changed)})
        return {k: v for k, v in statuses(book).items() if "verdict" in k}

    first, second = stored["verdicts"]
    assert with_verdicts(first | {"outcome": "contradicted"}) == {"verdict: A beats B": "FAIL"}
    assert with_verdicts(first | {"outcome": "undecided"}) == {"verdict: A beats B": "DRIFT"}
    assert with_verdicts(second | {"outcome": "not testable"}) == {"verdict: C beats B": "DRIFT"}
    assert with_verdicts(first | {"claim": "gone"}) == {"verdict: gone": "FAIL"}
    write_json(path, stored | {"verdicts": [second]})
    assert statuses(book) == {"(all)": "FAIL"}  # a verdict edited by hand


SOURCES = """from kd_notes.core import write_json
counts = {"trained": 0, "cached": 0, "replayed": 0, "record_date": None}
counts |= {"replayed": 75, "record_date": "2026-11-26"} if source == "record" else {"trained": 75}
write_json(f"{run_dir}/sources.json", counts)
print("source", source, "force", force)"""


@pytest.fixture
def training_book(tmp_path) -> notebooks_module.Book:
    parameters = PARAMETERS + '\nsource = "train"\nforce = False'
    echoed = ECHO.replace("jobs=jobs", "jobs=jobs, source=source, force=force")
    return make_book(tmp_path, small=standard(SOURCES, parameters=parameters, echo=echoed))


def test_a_replay_is_called_one(training_book):
    book = training_book
    done = cli(book, "reproduce", "--profile", "smoke", "--source", "record")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(75 replayed from the record of 2026-11-26)" in done.stdout
    record_module.record(["small"], "smoke", book)
    assert set(statuses(book).values()) == {"PASS (replayed)"}
    table = cli(book, "check", "--profile", "smoke")
    assert table.returncode == 0 and "0 PASS, 2 PASS (replayed), 0 DRIFT, 0 FAIL" in table.stdout
    assert "(replayed)" in cli(book, "list", "--profile", "smoke").stdout
    with_numbers(book, lambda n: n["a"].update(value=5))
    assert statuses(book)["a"] == "FAIL"  # a replay can still fail


def test_a_replay_does_not_stand_for_a_training(training_book):
    def run(*words, **options):
        [outcome] = reproduce_module.reproduce(profile="smoke", book=training_book, **options)
        return outcome.status

    assert run(source="record") == "done" and run(source="record") == "unchanged"
    assert run() == "done"  # what was replayed is trained
    assert run() == "unchanged" and run(source="record") == "unchanged"
    assert read_manifest(training_book.runs / "smoke" / "small")["source"]["trained"] == 75


def test_a_replay_is_made_again_when_the_record_has_changed(training_book):
    book = training_book
    rows = book.expected / "runs" / "stage.jsonl"
    rows.parent.mkdir(parents=True)

    def run(source):
        made = reproduce_module.reproduce(profile="smoke", book=book, source=source)
        return made[0].status

    rows.write_text('{"value": 1}\n')
    assert [run("record"), run("record")] == ["done", "unchanged"]
    rows.write_text('{"value": 2}\n')
    assert [run("record"), run("record")] == ["done", "unchanged"]
    (rows.parent / "more.jsonl").write_text("")
    assert run("record") == "done"
    manifest = book.runs / "smoke" / "small" / "manifest.json"
    old = read_json(manifest)
    del old["record"]
    write_json(manifest, old)  # of a run before the record was looked at
    assert run("record") == "done"
    assert run("train") == "done"
    rows.write_text('{"value": 3}\n')
    assert run("record") == "unchanged"  # nothing of it was replayed


def test_source_and_force_reach_the_notebook_and_are_not_in_the_key(training_book):
    def key():
        return read_manifest(training_book.runs / "smoke" / "small")["key"]

    reproduce_module.reproduce(profile="smoke", book=training_book)
    before = key()
    reproduce_module.reproduce(profile="smoke", book=training_book, source="record", force=True)
    log = (training_book.runs / "smoke" / "small" / "log.txt").read_text()
    assert "source record force True" in log and key() == before
    with pytest.raises(UserError, match="set by the runner"):
        reproduce_module.reproduce(profile="smoke", book=training_book, sets=["source=record"])
    with pytest.raises(UserError, match="train, cache, record"):
        reproduce_module.reproduce(profile="smoke", book=training_book, source="memory")


def test_hand_edits_fail_however_small(copy):
    path = record_module.expected_file(copy, "smoke", "small")
    path.write_text(path.read_text().replace('"n": 5', '"n": 6', 1))
    assert statuses(copy) == {"(all)": "FAIL"}
    assert cli(copy, "check", "--profile", "smoke").returncode == 1


def test_perturbed_metrics_fail_however_small(copy):
    path = copy.runs / "smoke" / "small" / "metrics.json"
    metrics = read_json(path)
    metrics["gain"]["value"] += 1e-6
    write_json(path, metrics)
    assert statuses(copy) == {"(all)": "FAIL"}
    with pytest.raises(UserError, match="changed after"):
        record_module.record(["small"], "smoke", copy)


def test_not_run_in_all_its_forms(copy):
    manifest_file = copy.runs / "smoke" / "small" / "manifest.json"
    manifest = read_json(manifest_file)
    write_json(manifest_file, manifest | {"kernel": manifest["kernel"] | {"device_class": "cuda"}})
    assert {(r.status, r.note) for r in record_module.check(profile="smoke", book=copy)} == {
        ("NOT RUN", "recorded on cpu, run on cuda")
    }
    for status in ("failed", "killed"):
        write_json(manifest_file, manifest | {"status": status})
        assert {(r.status, r.note) for r in record_module.check(profile="smoke", book=copy)} == {
            ("NOT RUN", f"the last run is {status}")
        }
    manifest_file.unlink()
    assert {(r.status, r.note) for r in record_module.check(profile="smoke", book=copy)} == {
        ("NOT RUN", "not run yet")
    }


@pytest.mark.parametrize(
    "wrong,message",
    [
        (["--task", "poetry"], "poetry"),
        (["--task", "nli", "--split", "pol"], "pol"),
        (["--task", "nli", "--teacher", "palm"], "palm"),
        (["--task", "nli"], "--out"),
        (
            [
                "--task",
                "nli",
                "--out",
                "a.jsonl",
                "--set",
                "concurency=2",
                "--teacher",
                "openai:http://127.0.0.1:9/v1#m",
            ],
            "concurency",
        ),
    ],
)
def test_extract_names_what_is_wrong_in_one_paragraph(wrong, message, tmp_path):
    words = (
        wrong
        if "--out" in wrong or message == "--out"
        else [*wrong, "--out", str(tmp_path / "a.jsonl")]
    )
    done = CliRunner().invoke(cli_module.app, ["extract", "--limit", "1", *words])
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output
    assert len(done.stderr.strip().splitlines()) <= 2


def test_record_says_what_changed(copy):
    with_numbers(
        copy,
        lambda n: (
            n["a"].update(value=5),
            n.update(old={"value": 1.0}),
            n.pop("gain"),
        ),
    )
    assert sorted(record_module.record(["small"], "smoke", copy)) == [
        "small: a: 5 -> 4",
        "small: gain = 2 is new",
        "small: old is gone (was 1)",
    ]
    assert record_module.record(["small"], "smoke", copy) == ["small: nothing changed"]


def test_record_adds_the_trainings_of_a_stage_and_replaces_none(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "cache"))
    grid = [{"draws": 10, "seed": seed} for seed in range(3)]
    results = run_grid("pi", "kd_notes.runner.runs:estimate_pi", grid, modules=["runner.runs"])
    record_runs("pi", [results[0] | {"metrics": {"pi": 3.0}}], copy.expected / "runs")
    done = cli(copy, "record", "--runs", "pi")
    assert done.returncode == 0 and done.stdout.strip() == "pi: 2 new, 3 recorded"
    assert load_record("pi", copy.expected / "runs")[stable_hash(grid[0])]["metrics"] == {"pi": 3.0}
    done = cli(copy, "record", "small", "--profile", "smoke", "--runs", "pi")
    assert done.stdout.splitlines() == ["pi: 0 new, 3 recorded", "small: nothing changed"]
    done = cli(copy, "record", "--runs", "pie")
    assert (
        done.returncode == 2
        and "pie: the cache has no finished run of this stage. Stages there: pi." in done.stderr
    )


@pytest.mark.parametrize(
    "numbers",
    [
        {"a": True},
        {"a": None},
        {"a": "1"},
        {"a": {"low": 1}},
        {"a": {"value": 1, "mean": 2}},
        [1],
        {"a": [1]},
    ],
)
def test_metrics_must_be_numbers(tmp_path, numbers):
    write_json(tmp_path / "metrics.json", numbers)
    with pytest.raises(UserError, match="metrics.json"):
        notebooks_module.read_numbers(tmp_path / "metrics.json")


def test_metrics_must_be_finite(tmp_path):
    (tmp_path / "metrics.json").write_text('{"a": NaN}')
    with pytest.raises(UserError, match="finite"):
        notebooks_module.read_numbers(tmp_path / "metrics.json")


# ---------------------------------------------------------------- publish


@pytest.fixture
def published(copy) -> notebooks_module.Book:
    publish_module.publish(["small"], "smoke", copy)
    return copy


def test_publish_copies_outputs_and_nothing_else(ran, published):
    before, after = (
        notebooks_module.read_notebook(b.results / "small.ipynb") for b in (ran, published)
    )
    assert [notebooks_module.cell_source(c) for c in before["cells"]] == [
        notebooks_module.cell_source(c) for c in after["cells"]
    ]
    texts = "".join(
        text for _, text in publish_module.output_text(notebooks_module.code_cells(after))
    )
    assert "a = 4" in texts and "a warning" not in texts and "drawn in runs/smoke/small" in texts
    assert not re.search("/(tmp|root|home|work)/", texts) and "<environment>" in texts
    [figure] = [
        o
        for c in notebooks_module.code_cells(after)
        for o in c["outputs"]
        if "image/png" in o.get("data", {})
    ]
    assert (
        figure["metadata"]["image/png"]["alt"] == "two arms"
        and "".join(figure["data"]["text/plain"]) == "Figure: two arms"
    )
    stamp = after["metadata"]["kd_notes"]
    assert (
        stamp["key"] == read_manifest(published.runs / "smoke" / "small")["key"]
        and stamp["profile"] == "smoke"
    )
    assert f"key {stamp['key']}" in texts
    assert publish_module.check_published(published) == []


def test_nbdev_clean_changes_nothing_and_the_tag_survives(published):
    pytest.importorskip("nbdev")
    root = published.nbs.parent
    settings = (Path(__file__).parents[1] / "settings.ini").read_text()
    (root / "settings.ini").write_text(settings)
    (root / "kd_notes").mkdir()
    before = (published.results / "small.ipynb").read_bytes()
    subprocess.run(
        [
            str(Path(sys.executable).with_name("nbdev_clean")),
            "--fname",
            str(published.results / "small.ipynb"),
        ],
        cwd=root,
        check=True,
    )
    assert (published.results / "small.ipynb").read_bytes() == before
    assert (
        notebooks_module.notebook_parameters(
            notebooks_module.read_notebook(published.results / "small.ipynb")
        )["a"].default
        == 2
    )
    assert publish_module.check_published(published) == []


def test_text_that_a_kernel_sent_in_pieces_is_published_as_one():
    def said(name, text):
        return {"output_type": "stream", "name": name, "text": [text]}

    pieces = [said("stdout", "drawn in "), said("stderr", "a warning"), said("stdout", "runs\n")]
    cell = {"cell_type": "code", "source": "show()", "metadata": {}, "outputs": pieces}
    nb = {"cells": [cell]}
    [made] = publish_module._executed_outputs(nb, nb, {}, "small")
    assert made == [said("stdout", "drawn in runs\n")]


def test_publishing_again_is_stable(published):
    before = (published.results / "small.ipynb").read_bytes()
    publish_module.publish(["small"], "smoke", published)
    assert (published.results / "small.ipynb").read_bytes() == before


SECRET = "/".join(["", "home", "alice", "secret"])  # a path that is no path in this file


def edit(book: notebooks_module.Book, old: str, new: str) -> None:
    path = book.results / "small.ipynb"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_published_notebooks_that_are_not_what_the_record_says(published):
    path = published.results / "small.ipynb"
    good = path.read_text()

    def problems(old="", new=""):
        path.write_text(good)
        if old:
            edit(published, old, new)
        return " ".join(publish_module.check_published(published))

    assert problems() == ""
    assert "code has changed" in problems("a * scale", "a + scale")
    assert "edited after publishing" in problems("drawn in runs", "drawn in heaven")
    assert "edited after publishing" in problems('"date": "2', '"date": "3')
    assert "edited after publishing" in problems('"profile": "smoke"', '"profile": "cpu"')
    assert problems("## Exercises", "## Questions") == ""
    with_numbers(published, lambda n: n["a"].update(value=5))
    assert "not those of data/expected/smoke/small.json" in problems()
    nb = json.loads(good)
    del nb["metadata"]["kd_notes"]
    path.write_text(publish_module.notebook_text(nb))
    assert "no stamp" in " ".join(publish_module.check_published(published))


def test_publish_refuses_what_it_should_and_writes_nothing(copy):
    path = copy.results / "small.ipynb"
    before = path.read_bytes()

    def refused(message):
        with pytest.raises(UserError, match=message):
            publish_module.publish(["small"], "smoke", copy)
        assert "kd_notes" not in json.loads(path.read_text())["metadata"]

    executed = copy.runs / "smoke" / "small" / "executed.ipynb"
    good = executed.read_text()
    executed.write_text(good.replace("drawn in", SECRET))
    refused("path of this machine|has changed")
    nb = json.loads(good)
    notebooks_module.code_cells(nb)[-1]["outputs"].append(
        {"output_type": "stream", "name": "stdout", "text": ["see " + SECRET]}
    )
    executed.write_text(json.dumps(nb))
    refused(SECRET[:11])
    notebooks_module.code_cells(nb)[-1]["outputs"][-1]["text"] = ["x" * 260_000]
    executed.write_text(json.dumps(nb))
    refused("more than 250; most of it .* code cell 5")
    executed.write_text(good)
    with_numbers(copy, lambda n: n["a"].update(value=5))
    refused("kd-notes record small")
    record_module.record(["small"], "smoke", copy)
    edit(copy, "a * scale", "a + scale")
    refused("code of the notebook has changed")
    path.write_bytes(before)
    (copy.runs / "smoke" / "small" / "manifest.json").unlink()
    refused("no finished run")
    assert path.read_bytes() == before


def test_image_data_is_not_searched_for_paths():
    image = {
        "output_type": "display_data",
        "data": {"image/png": "AAA/" + "home/BBB", "text/plain": ["Figure"]},
        "metadata": {"image/png": {"alt": "x"}},
    }
    made = publish_module._clean_output(image, {"/home": "~"})
    assert made["data"]["image/png"] == "AAA/" + "home/BBB" and made["metadata"] == {
        "image/png": {"alt": "x"}
    }
    publish_module._no_machine_paths([{"outputs": [made]}], "x")


def test_a_progress_bar_is_not_published_and_a_widget_leaves_its_picture():
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Loading:   0%|"}
    output = {"output_type": "display_data", "data": widget, "metadata": {}}
    assert publish_module._clean_output(output, {}) is None
    framed = output | {"data": widget | {"text/html": "<b>frame</b>"}}
    assert publish_module._clean_output(framed, {})["data"] == {"text/html": ["<b>frame</b>"]}


# ---------------------------------------------------------------- command line


def test_list_is_quick_and_shows_the_state(ran):
    start = time.monotonic()
    done = cli(ran, "list", "--profile", "smoke")
    assert time.monotonic() - start < 3  # about 0.4 s on an idle core
    line = next(x for x in done.stdout.splitlines() if "small" in x)
    assert (
        line.split()[:4] == ["*", "small", "3.0", "s"]
        and "done 20" in line
        and line.endswith("Small")
    )


@pytest.mark.parametrize(
    "words,message",
    [
        (("reproduce", "smal", "--profile", "smoke"), "Did you mean small?"),
        (("reproduce", "--profile", "big"), "Known profiles: smoke"),
        (("reproduce", "--profile", "smoke", "--set", "b=1"), "Known: a, names, scale"),
        (("reproduce", "--profile", "smoke", "--set", "a=x"), "not of type int"),
        (("reproduce", "--profile", "smoke", "--jobs", "0"), "--jobs"),
        (("check", "other", "--profile", "smoke"), "no results notebook 'other'"),
        (("record", "--profile", "smoke"), "no notebook is named"),
        (("publish", "nothing", "--profile", "smoke"), "Known: small"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_2(ran, words, message):
    done = cli(ran, *words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.startswith("kd-notes: ")
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


QUESTIONS = [
    {
        "id": f"q{i}",
        "task": "svamp",
        "input": f"Ann has {i} pens and buys 2. How many has she?",
        "label": f"{i} + 2",
    }
    for i in range(5)
]


class Stub:
    "A teacher that knows how to add; right for even numbers only."

    name, revision = "stub", "1"

    def describe(self):
        return {"kind": "stub", "model": self.name, "revision": self.revision}

    def generate(self, requests, decoding):
        from kd_notes.generation.backends import Completion

        for name, _ in requests:
            i = int(name[1:])
            yield Completion(
                name, f" {i} and 2 more.\nAnswer: {i} + {2 + i % 2}\n", 9, 9, "stop", 0.1
            )


@pytest.mark.parametrize(
    "text, value",
    [
        ("false", False),
        ("No", False),
        ("off", False),
        (" FALSE", False),
        ("true", True),
        ("yes", True),
        ("On", True),
        ("none", None),
        ("null", None),
        ("0", 0),
        ("1e-4", 1e-4),
        ("1_000", 1000),
        ("[1, 2]", [1, 2]),
        ("[true, false]", [True, False]),
        ("{'beta': 0.1}", {"beta": 0.1}),
        ("'no'", "no"),
        ("smollm2", "smollm2"),
        ("http://127.0.0.1:9/v1?a=b", "http://127.0.0.1:9/v1?a=b"),
        ("NaN", "NaN"),  # a text, so that no number is set to it
        ("Infinity", "Infinity"),
        ("", ""),
    ],
)
def test_a_setting_of_the_command_line_has_the_value_that_is_meant(text, value):
    [(name, found)] = plain_settings([f"x={text}"]).items()
    assert name == "x" and found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["x", "=3", "two words=3", "a.b=3", "", "1x=3"])
def test_a_setting_without_a_name_or_value_is_refused(text):
    with pytest.raises(UserError, match="form k=v"):
        plain_settings([text])


@pytest.mark.parametrize(
    "words, option",
    [
        (["distill", "--data", "d.jsonl", "--out", "o", "--set", "teacher=x"], "--teacher"),
        (["distill", "--data", "d.jsonl", "--out", "o", "--set", "profile=cpu"], "--profile"),
        (["extract", "--task", "nli", "--out", "o", "--set", "limit=3"], "--limit"),
        (
            ["extract", "--task", "nli", "--out", "o", "--set", "max_new_tokens=3"],
            "--max-new-tokens",
        ),
    ],
)
def test_a_setting_that_is_an_option_is_named(words, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli_module.app, words)
    assert done.exit_code == 2 and option in done.stderr and not any(tmp_path.iterdir())


@pytest.mark.parametrize("word, value", [("no", False), ("off", False), ("yes", True)])
def test_a_switch_of_a_notebook_takes_words(word, value):
    known = {"one": {"flag": notebooks_module.Parameter("flag", not value)}}
    assert profiles_module.parse_sets([f"flag={word}"], known) == {"one": {"flag": value}}


def test_extract_on_the_command_line_goes_on_where_it_was(tmp_path):
    source, stored, out = tmp_path / "in.jsonl", tmp_path / "stored.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    rationales_module.extract(
        examples_module.load_jsonl(source, "svamp"),
        Stub(),
        rationales_module.rationale_decoding(),
        stored,
    )

    def command(*more):
        words = [
            "extract",
            "--task",
            "svamp",
            "--input",
            str(source),
            "--teacher",
            f"replay:{stored}",
            "--out",
            str(out),
            *more,
        ]
        return CliRunner().invoke(cli_module.app, words)

    done = command("--limit", "2")
    assert (
        done.exit_code == 0
        and json.loads(done.stdout)["rows"] == 2
        and len(out.read_text().splitlines()) == 2
    ), done.stderr
    made = json.loads(command().stdout)
    assert made == {"file": str(out), "rows": 5, "outcomes": {"ok": 5}, "accuracy": 0.6}
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert sorted(ids) == [f"q{i}" for i in range(5)]
    other = command("--max-new-tokens", "5")
    assert (
        other.exit_code == 2
        and "max_new_tokens" in other.stderr
        and len(other.stderr.strip().splitlines()) == 1
    )
    source.write_text("")
    assert command().exit_code == 2 and len(out.read_text().splitlines()) == 5


def test_a_folder_that_is_no_book(tmp_path):
    with pytest.raises(UserError, match="nbs"):
        notebooks_module.open_book(tmp_path)


def test_plain_progress_has_no_control_characters(capsys, monkeypatch):
    from kd_notes.progress import progress

    with progress(total=7, desc="nb (about 1 min 00 s)", unit="cell", mode="lines") as bar:
        execute_module._follow("Executing Cell 2-------", bar)
        execute_module._follow("\x1b[32mstudents: 1/3\x1b[0m\n", bar)
        execute_module._follow("Ending Cell 2------", bar)
        bar.last_print_t -= 11
        bar.update(0)
        bar.update(0)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "\r" not in err and "\x1b" not in err
    assert "nb (about 1 min 00 s): 2/7 cell" in err and err.strip().endswith("; students: 1/3")


# ---------------------------------------------------------------- the project's own book


def test_every_profile_of_this_project_is_valid():
    book = notebooks_module.open_book()
    for name in profiles_module.profile_names(book):
        profiles_module.load_profile(book, name)
    for name in notebooks_module.result_names(book):
        assert notebooks_module.notebook_title(
            notebooks_module.read_notebook(book.results / f"{name}.ipynb")
        )
