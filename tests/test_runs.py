"""kd_notes.runner: run folders, cache keys, grids of real processes with real kills, the record."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

import kd_notes
import kd_notes.environment as environment_module
import kd_notes.runner.code as code_module
from kd_notes.core import append_jsonl, read_json, read_jsonl, stable_hash, UserError, write_json
from kd_notes.environment import environment
from kd_notes.experiments.base import Experiment
from kd_notes.experiments.healed import spec_checksums
from kd_notes.runner.code import code_hash, code_modules, run_key
from kd_notes.runner.grid import (
    cached_runs,
    GridError,
    load_record,
    record_file,
    record_runs,
    run_grid,
    sources_line,
)
from kd_notes.runner.workers import limit_threads, Worker
from kd_notes.runner.runs import cached, read_manifest, read_run, Run, run_folder, run_status

PI = "kd_notes.runner.runs:estimate_pi"

TARGETS = """
import os, random, sys, time
from kd_notes.core import append_jsonl, read_jsonl, seed_everything
from kd_notes.runner.runs import Run

def noisy(params, folder):
    print("a library prints this")
    print("and this", file=sys.stderr)
    return {"x": params["seed"]}

def selective(params, folder):
    "Fails, dies or works, as its parameters say."
    if params["how"] == "raise": raise ValueError("the bad one")
    if params["how"] == "die": os.kill(os.getpid(), 9)
    if params["how"] == "exit": os._exit(3)
    if params["how"] == "extra": raise ModuleNotFoundError("No module named 'papermill'", name="papermill")
    if params["how"] == "text": return "not a dictionary"
    if params["how"] == "nan": return {"x": float("nan")}
    return {"x": params["seed"]}

def counting(params, folder):
    "Notes each call in a file outside the cache."
    append_jsonl(params["log"] + "/" + str(params["seed"]) + ".jsonl", [{"pid": os.getpid()}])
    time.sleep(params.get("pause", 0))
    return {"x": params["seed"]}

def steps(params, folder):
    "Logs ten steps and goes on where an earlier attempt stopped; dies at the step `die` of the first attempt."
    path = folder/"metrics.jsonl"
    done = len(read_jsonl(path, repair_tail=True)) if path.exists() else 0
    for step in range(done, 10):
        if done == 0 and step == params["die"]: os.kill(os.getpid(), 9)
        append_jsonl(path, [{"step": step}])
    return {"resumed_at": done, "steps": len(read_jsonl(path))}

def product(params, folder):
    "A matrix product large enough for several threads; its last digits depend on their number."
    import torch
    seed_everything(params["seed"])
    a = torch.randn(384, 384) @ torch.randn(384, 384)
    return {"sum": a.pow(3).sum().item(), "threads": torch.get_num_threads()}
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KD_NOTES_PROGRESS", "off")
    return tmp_path / "cache"


@pytest.fixture
def targets(tmp_path, monkeypatch, cache):
    "A module of run functions that this process and its workers can import."
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "grid_targets.py").write_text(TARGETS)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    sys.modules.pop("grid_targets", None)
    yield "grid_targets"
    sys.modules.pop("grid_targets", None)


def alive(pid: int) -> bool:
    "Whether a process exists and is not a zombie."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


# --- the fingerprint of the code --------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    "A copy of the package that may be edited, and a function that hashes its modules in a fresh process."
    shutil.copytree(
        Path(kd_notes.__file__).parent,
        tmp_path / "copy" / "kd_notes",
        ignore=shutil.ignore_patterns("__pycache__"),
    )

    def ask(*modules: str) -> str:
        code = f"from kd_notes.runner.code import code_hash; print(code_hash(*{modules!r}))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "copy"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return tmp_path / "copy" / "kd_notes", ask


def test_comments_and_docstrings_do_not_change_the_code_hash(package):
    folder, ask = package
    before, path = ask("losses.adaptive"), folder / "core.py"
    assert before == code_hash("losses.adaptive")
    text = path.read_text()
    first = 'def sha256_text(text: str) -> str:\n    "'
    marked = text.replace(first, first.replace('    "', '    # why\n    "Now '))
    path.write_text("# a comment\n" + marked)
    assert path.read_text().count("Now ") == text.count("Now ") + 1
    assert ask("losses.adaptive") == before


def test_code_changes_the_hash_also_through_imports_and_only_there(package):
    folder, ask = package
    names = "core", "losses.adaptive", "data.answers"
    before = [ask(name) for name in names]
    assert len(set(before)) == 3
    changed = folder / "losses" / "divergences.py"
    changed.write_text(changed.read_text() + "\nEXTRA = 1\n")
    core, adaptive, answers = (ask(name) for name in names)
    assert core == before[0] and adaptive != before[1] and answers == before[2]
    (folder / "core.py").write_text((folder / "core.py").read_text() + "\nEXTRA = 1\n")
    assert all(ask(name) != old for name, old in zip(names, before))


def test_the_hash_follows_modules_of_subpackages(package):
    "A module of a subpackage counts by its dotted name, however it is imported, and so does what it imports itself."
    folder, ask = package
    (folder / "deep" / "er").mkdir(parents=True)
    for path, text in {
        "deep/__init__.py": "",
        "deep/er/__init__.py": "",
        "deep/one.py": "from ..core import rng\nfrom .two import X\n",
        "deep/two.py": "X = 1\n",
        "deep/er/three.py": "from ..two import X\nfrom ...data.answers import accuracy\n",
        "deep/four.py": "def f():\n    from kd_notes.deep.er import three\n",
        "deep/alone.py": "Y = 1\n",
    }.items():
        (folder / path).write_text(text)
    names = "deep.one", "kd_notes.deep.er.three", "deep.four"
    before = [ask(name) for name in names]
    assert len(set(before)) == 3
    (folder / "deep" / "alone.py").write_text("Y = 2\n")
    assert [ask(name) for name in names] == before
    (folder / "deep" / "two.py").write_text("X = 2\n")
    assert all(ask(name) != old for name, old in zip(names, before))


def test_code_modules_follow_imports():
    assert code_modules("core") == ["core"] and code_modules("kd_notes.losses.adaptive") == [
        "core",
        "losses.adaptive",
        "losses.divergences",
        "losses.families",
    ]
    with pytest.raises(UserError, match="kd_notes.nowhere"):
        code_modules("nowhere")


@pytest.mark.parametrize(
    "first, second, same",
    [
        ("x = 1", "x  =  1  # one", True),
        ('def f():\n    "doc"\n    return 1', "def f():\n    return 1", True),
        ('class C:\n    "doc"\n    x = 1', "class C:\n    x = 1", True),
        ('"""module"""\nx = 1', "x = 1", True),
        ("async def f():\n    'doc'\n    pass", "async def f():\n    pass", True),
        ("x = 1", "x = 1.0", False),
        ("x = 'a'", "x = 'b'", False),
        ("def f():\n    return 'doc'", "def f():\n    return 'cod'", False),
        ("def f(a, b): pass", "def f(b, a): pass", False),
        ("x = 1\n'a text in the middle'", "x = 1\n'another'", False),
    ],
)
def test_tree_hash(first, second, same):
    assert (code_module._tree_hash(first) == code_module._tree_hash(second)) is same


class Watched(dict):
    "The parameters of a run, and which of them were read."

    def __init__(self, params: dict):
        super().__init__(params)
        self.read: set[str] = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.read.add(name)
        return super().get(name, default)


def families() -> dict[str, type]:
    "Return the families of experiments by the names of their stages."
    for file in (Path(kd_notes.__file__).parent / "experiments").glob("*.py"):
        importlib.import_module(f"kd_notes.experiments.{file.stem}")
    known, todo = {}, [Experiment]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if kind.__module__.startswith("kd_notes.") and kind.name:
            known[kind.name] = kind
    return known


def test_inputs_are_asked_once_for_all_runs_and_so_read_the_named_settings_only():
    "`Experiment.results` asks once for all runs that agree in `input_settings`."
    asked = 0
    for name, kind in families().items():
        for row in list(load_record(name).values())[:2]:
            run = Watched(row["params"])
            with suppress(UserError, OSError):  # a file of real data is not here
                kind().inputs(run)
            asked += 1
            assert run.read <= set(kind.input_settings), (name, run.read)
    assert asked > 30


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt", "tokenizer.model"])
def test_every_file_of_a_model_is_in_the_checksums(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    before = spec_checksums(str(tmp_path))
    (tmp_path / name).write_text("a")
    first = spec_checksums(str(tmp_path))
    (tmp_path / name).write_text("b")
    assert len(before) == 2 and len(first) == 3 and first != spec_checksums(str(tmp_path))


def test_key_depends_on_all_that_decides_the_numbers(monkeypatch):
    def key(stage="s", params=None, modules=("core",), checksums=None, threads=1):
        return run_key(stage, params or {"a": 1}, list(modules), checksums, threads)

    keys = [
        key(),
        key(stage="t"),
        key(params={"a": 2}),
        key(params={"a": 1.0}),
        key(modules=["runner.runs"]),
        key(checksums={"d": "0"}),
        key(checksums={"d": "1"}),
        key(threads=2),
    ]
    assert len(set(keys)) == len(keys) and key() == keys[0]
    assert key(params={"b": 2, "a": (1, 2)}) == key(params={"a": [1, 2], "b": 2})
    here = environment_module.versions()
    for library, decides in (
        ("torch", True),
        ("transformers", True),
        ("tokenizers", True),
        ("papermill", False),
    ):
        with monkeypatch.context() as m:
            m.setattr(code_module, "versions", lambda lib=library: here | {lib: "0.0"})
            assert (key() != keys[0]) is decides


# --- run folders ------------------------------------------------------------------------------------------------------------------


def test_manifest_says_where_and_with_what(tmp_path):
    with Run.open(
        tmp_path / "r", {"seed": 4}, stage="s", dtype="float32", effective_batch=16
    ) as run:
        run.log(step=1, loss=0.5)
        run.finish({"acc": 0.5})
    m = read_manifest(tmp_path / "r")
    assert (
        m["status"],
        m["seed"],
        m["stage"],
        m["dtype"],
        m["effective_batch"],
        m["attempts"],
    ) == ("done", 4, "s", "float32", 16, 1)
    assert (
        m["teacher"] is None and m["student"] is None and m["error"] is None
    )  # unknown is null, and the key is there
    assert {
        "git_commit",
        "git_dirty",
        "versions",
        "device",
        "threads",
        "peak_memory_mib",
        "seconds",
        "start",
        "end",
    } <= m.keys()
    assert (
        m["versions"]["python"] == sys.version.split()[0]
        and m["versions"]["torch"] == environment()["versions"]["torch"] is not None
    )
    assert m["peak_memory_mib"] > 10 and m["seconds"] >= 0 and m["end"] >= m["start"]
    assert read_json(tmp_path / "r" / "params.json") == {"seed": 4} and read_run(
        tmp_path / "r"
    ) == {"acc": 0.5}
    assert read_jsonl(tmp_path / "r" / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("x"), "failed"),
        (UserError("x"), "failed"),
        (KeyboardInterrupt(), "killed"),
        (SystemExit(1), "killed"),
    ],
)
def test_an_error_leaves_no_result(tmp_path, error, status):
    with pytest.raises(type(error)), Run.open(tmp_path / "r", {}) as run:
        run.finish({"acc": 1.0})  # even if a result was written before the error
        raise error
    assert run_status(tmp_path / "r") == status and read_run(tmp_path / "r") is None
    assert type(error).__name__ in read_manifest(tmp_path / "r")["error"]


def test_a_run_that_never_finishes_is_failed(tmp_path):
    with Run.open(tmp_path / "r", {}):
        pass
    assert (
        run_status(tmp_path / "r") == "failed"
        and "finish()" in read_manifest(tmp_path / "r")["error"]
    )


def test_a_finished_or_foreign_run_is_never_overwritten(tmp_path):
    with Run.open(tmp_path / "r", {"a": 1}) as run:
        (tmp_path / "r" / "figure.csv").write_text("1")
        run.finish({"acc": 0.5})
    for params, said in (({"a": 1}, "finished"), ({"a": 2}, "other parameters")):
        with pytest.raises(UserError, match=said), Run.open(tmp_path / "r", params):
            pass
    assert read_run(tmp_path / "r") == {"acc": 0.5} and (tmp_path / "r" / "figure.csv").exists()
    with Run.open(tmp_path / "r", {"a": 2}, force=True) as run:
        assert not (tmp_path / "r" / "figure.csv").exists() and read_run(tmp_path / "r") is None
        run.finish({"acc": 0.6})
    assert read_run(tmp_path / "r") == {"acc": 0.6}


def test_rewind_forgets_what_will_be_logged_again(tmp_path):
    with Run.open(tmp_path / "r", {}) as run:
        run.rewind(3)  # nothing there yet
        for step in range(1, 6):
            run.log(step=step)
        run.rewind(3)
        run.log(step=4, again=True)
        run.finish({})
    assert [(r["step"], r.get("again")) for r in read_jsonl(tmp_path / "r" / "metrics.jsonl")] == [
        (1, None),
        (2, None),
        (3, None),
        (4, True),
    ]


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    code = "import sys, time\nfrom kd_notes.runner.runs import Run\nwith Run.open(sys.argv[1], {}): print('in', flush=True); time.sleep(60)"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True
    )
    try:
        other.stdout.readline()
        assert run_status(tmp_path / "r") == "running"
        with pytest.raises(UserError, match="another process"), Run.open(tmp_path / "r", {}):
            pass
    finally:
        other.kill()
        other.wait()
    assert run_status(tmp_path / "r") == "killed"
    with Run.open(tmp_path / "r", {}) as run:
        run.finish({"acc": 1})
    assert read_manifest(tmp_path / "r")["attempts"] == 2


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no file size limits here")
def test_full_disk_at_the_end_leaves_a_failed_run_not_a_half_result(tmp_path):
    code = f"""
import resource
from kd_notes.core import UserError
from kd_notes.runner.runs import Run
try:
    with Run.open({str(tmp_path / "r")!r}, {{}}) as run:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        run.finish({{"curve": list(range(9000))}})
except UserError as e: print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "metrics.json" in done.stdout and "Free some space" in done.stdout, done.stderr
    assert (
        run_status(tmp_path / "r") == "failed"
        and read_run(tmp_path / "r") is None
        and not (tmp_path / "r" / "metrics.json").exists()
    )


# --- cached -----------------------------------------------------------------------------------------------------------------------


def test_cached_computes_once_and_force_again(cache):
    calls = []

    def fn(params, folder):
        calls.append(folder)
        return {"x": params["a"], "t": (1, 2)}

    results = [cached("s", {"a": 1}, fn, modules=["core"]) for _ in range(3)]
    assert (
        results == [{"x": 1, "t": [1, 2]}] * 3 and len(calls) == 1
    )  # the first answer has the type of the later ones
    assert calls[0] == run_folder("s", run_key("s", {"a": 1}, ["core"]))
    cached("s", {"a": 1}, fn, modules=["core"], checksums={"pool": "0"})
    cached("s", {"a": 1}, fn, modules=["core"], force=True)
    assert len(calls) == 3


def test_half_a_result_is_never_read(cache):
    "What a process leaves that was killed after writing metrics.json and before saying so."
    folder = run_folder("s", run_key("s", {"a": 1}, ["core"]))
    write_json(folder / "params.json", {"a": 1})
    write_json(folder / "metrics.json", {"x": "half"})
    write_json(folder / "manifest.json", {"status": "running", "attempts": 1})
    assert cached("s", {"a": 1}, lambda params, folder: {"x": "whole"}, modules=["core"]) == {
        "x": "whole"
    }


def test_two_processes_asking_for_the_same_run_train_once(tmp_path, targets, cache):
    code = (
        "import sys; from kd_notes.runner.runs import cached; from kd_notes.runner.workers import find_target\n"
        f"print(cached('s', {{'seed': 5, 'log': {str(tmp_path / 'calls')!r}, 'pause': 1}}, find_target('grid_targets:counting'), modules=['core']))"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, text=True)
        for _ in range(2)
    ]
    assert [p.communicate(timeout=60)[0].strip() for p in both] == ["{'x': 5}"] * 2
    assert len(read_jsonl(tmp_path / "calls" / "5.jsonl")) == 1


# --- grids ------------------------------------------------------------------------------------------------------------------------


def test_grid_results_do_not_depend_on_the_number_of_jobs(targets, cache, monkeypatch):
    "Two processes and one give the same bits, even for a product that several threads would sum differently."
    import torch

    grid, kept = [{"seed": s} for s in range(4)], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one = run_grid("product", "grid_targets:product", grid, modules=["core"])
        assert torch.get_num_threads() == 2  # the caller's setting is back
    finally:
        torch.set_num_threads(kept)
    two = run_grid("product", "grid_targets:product", grid, modules=["core"], jobs=2, force=True)
    assert [r["metrics"] for r in one] == [r["metrics"] for r in two]
    assert {r["metrics"]["threads"] for r in one + two} == {1}
    assert [r["params"] for r in two] == grid and {r["source"] for r in two} == {"trained"}
    assert {
        r["source"]
        for r in run_grid("product", "grid_targets:product", grid, modules=["core"], jobs=2)
    } == {"cached"}


def test_limit_threads_restores_what_it_found(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with limit_threads(2):
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "2"
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("jobs", [1, 2])
def test_duplicates_run_once_and_order_is_kept(tmp_path, targets, cache, jobs):
    grid = [{"seed": s, "log": str(tmp_path / "calls")} for s in (3, 1, 3, 2, 1)]
    results = run_grid("s", "grid_targets:counting", grid, modules=["core"], jobs=jobs)
    assert [r["metrics"]["x"] for r in results] == [3, 1, 3, 2, 1]
    assert all(len(read_jsonl(p)) == 1 for p in (tmp_path / "calls").iterdir())


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_run_does_not_stop_the_others(targets, cache, jobs):
    how = ["ok", "raise", "text", "ok", "nan", "ok"]
    grid = [{"how": h, "seed": i} for i, h in enumerate(how)]
    with pytest.raises(GridError, match="3 of 6 runs failed") as e:
        run_grid("s", "grid_targets:selective", grid, modules=["core"], jobs=jobs)
    assert (
        "how=raise, seed=1" in str(e.value)
        and "the bad one" in str(e.value)
        and "metrics.x" in str(e.value)
    )
    assert sorted(task.params["seed"] for task, _ in e.value.failures) == [1, 2, 4]
    assert any("ValueError: the bad one" in outcome["traceback"] for _, outcome in e.value.failures)
    status = [run_status(run_folder("s", run_key("s", p, ["core"]))) for p in grid]
    assert status == ["done", "failed", "failed", "done", "failed", "done"]


def test_a_worker_that_dies_is_one_failed_run(targets, cache):
    "Killed by the system (as for lack of memory), or gone by itself; the runs behind it get another worker."
    grid = [{"how": h, "seed": i} for i, h in enumerate(["ok", "die", "exit", "ok", "ok", "ok"])]
    with pytest.raises(GridError, match="2 of 6 runs failed") as e:
        run_grid("s", "grid_targets:selective", grid, modules=["core"], jobs=2)
    assert "signal 9" in str(e.value) and "exit code 3" in str(e.value)
    assert Counter(run_status(run_folder("s", run_key("s", p, ["core"]))) for p in grid) == {
        "done": 4,
        "killed": 2,
    }


def test_a_killed_run_is_resumed_in_its_folder(targets, cache):
    with pytest.raises(GridError, match="signal 9"):
        run_grid("s", "grid_targets:steps", [{"die": 4}, {"die": 99}], modules=["core"], jobs=2)
    results = run_grid(
        "s", "grid_targets:steps", [{"die": 4}, {"die": 99}], modules=["core"], jobs=2
    )
    assert [r["metrics"] for r in results] == [
        {"resumed_at": 4, "steps": 10},
        {"resumed_at": 0, "steps": 10},
    ]
    assert [r["source"] for r in results] == ["trained", "cached"]


def test_what_a_worker_prints_is_kept_and_disturbs_nothing(targets, cache, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    results = run_grid(
        "s", "grid_targets:noisy", [{"seed": s} for s in range(3)], modules=["core"], jobs=2
    )
    assert [r["metrics"]["x"] for r in results] == [0, 1, 2]
    assert (run_folder("s", results[1]["key"]) / "log.txt").read_text().split("\n")[:2] == [
        "a library prints this",
        "and this",
    ]


def test_mistakes_in_the_call_are_told(targets, cache):
    with pytest.raises(GridError, match=r"kd_notes\[notebooks\]"):
        run_grid("s", "grid_targets:selective", [{"how": "extra"}], modules=["core"])
    with pytest.raises(GridError, match="no_such"):
        run_grid("s", "kd_notes.runner.runs:no_such", [{}], modules=["core"])
    with pytest.raises(UserError, match="jobs=0"):
        run_grid("s", PI, [{}], modules=["core"], jobs=0)
    with pytest.raises(UserError, match="kd_notes.nowhere"):
        run_grid("s", PI, [{}], modules=["nowhere"])
    assert run_grid("s", PI, [], modules=["core"]) == []


GRID = """
from kd_notes.runner.grid import run_grid
grid = [{{"seed": s, "log": {log!r}, "pause": 0.5}} for s in range(12)]
run_grid("s", "grid_targets:counting", grid, modules=["core"], jobs={jobs})
"""


def interrupted_grid(
    tmp_path, cache, jobs: int, sig: signal.Signals
) -> tuple[subprocess.Popen, list[Path]]:
    "Start a grid of twelve runs in a real process, wait for two finished ones, send the signal."
    env = os.environ | {"PYTHONPATH": str(tmp_path / "lib"), "KD_NOTES_PROGRESS": "lines"}
    process = subprocess.Popen(
        [sys.executable, "-c", GRID.format(log=str(tmp_path / "calls"), jobs=jobs)],
        stderr=subprocess.PIPE,
        env=env,
        text=True,
    )
    folder = cache / "runs" / "s"

    def done():
        return sum(run_status(f) == "done" for f in folder.glob("*")) if folder.exists() else 0

    wait_for(lambda: done() >= 2)
    process.send_signal(sig)
    process.wait(timeout=30)
    return process, list(folder.iterdir())


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_keeps_finished_runs_and_ends_the_workers(tmp_path, targets, cache, jobs):
    process, folders = interrupted_grid(tmp_path, cache, jobs, signal.SIGINT)
    assert "KeyboardInterrupt" in process.stderr.read() and process.returncode != 0
    pids = {read_manifest(f)["pid"] for f in folders if read_manifest(f)}
    assert not any(alive(pid) for pid in pids)
    status = Counter(run_status(f) for f in folders)
    assert (
        2 <= status["done"] < 12
        and status["running"] == 0
        and set(status) <= {"done", "killed", "absent"}
    )
    called = {p.stem for p in (tmp_path / "calls").iterdir()}

    grid = [{"seed": s, "log": str(tmp_path / "calls"), "pause": 0.5} for s in range(12)]
    results = run_grid("s", "grid_targets:counting", grid, modules=["core"], jobs=2)
    assert [r["metrics"]["x"] for r in results] == list(range(12))
    assert Counter(r["source"] for r in results) == {
        "cached": status["done"],
        "trained": 12 - status["done"],
    }
    finished = [s for s in range(12) if results[s]["source"] == "cached"]
    assert all(
        len(read_jsonl(tmp_path / "calls" / f"{s}.jsonl")) == 1 and str(s) in called
        for s in finished
    )


def test_workers_end_when_their_parent_is_killed(tmp_path, targets, cache):
    _, folders = interrupted_grid(tmp_path, cache, 2, signal.SIGKILL)
    pids = {m["pid"] for f in folders if (m := read_manifest(f))}
    wait_for(lambda: not any(alive(pid) for pid in pids), seconds=10)
    assert all(run_status(f) in ("done", "killed", "absent") for f in folders)


def test_a_worker_whose_parent_died_before_it_began_ends_too(cache):
    "A parent that is killed while its worker starts: the worker's own question would name process 1."
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    process = subprocess.Popen(
        [sys.executable, "-c", Worker.PROGRAM],
        env=os.environ | {"KD_NOTES_PARENT": str(gone.pid)},
        stdin=subprocess.PIPE,  # stays open, as of a pipe that another process has inherited
    )
    assert process.wait(timeout=60) == 1
    process.stdin.close()


# --- the record -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(cache):
    return run_grid("pi", PI, [{"draws": 100, "seed": s} for s in range(3)], modules=["core"])


def test_record_replays_without_running(tmp_path, results, cache, monkeypatch):
    assert record_runs("pi", results, tmp_path / "rec") == 3
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "empty"))
    grid = [{"draws": 100, "seed": s} for s in range(4)]
    record = {"source": "record", "record_folder": tmp_path / "rec"}
    # other modules, other keys: noted, not required
    again = run_grid("pi", PI, grid, modules=["runner.runs"], jobs=2, **record)
    assert [r["source"] for r in again] == ["replayed"] * 3 + ["trained"]
    assert [r["metrics"] for r in again[:3]] == [r["metrics"] for r in results]
    assert [r["key"] for r in again[:3]] == [r["key"] for r in results]
    assert {"params", "metrics", "key", "seconds", "source"} <= again[0].keys() & again[3].keys()
    assert not any(r["same_key"] for r in again[:3])
    same = run_grid("pi", PI, grid[:3], modules=["core"], **record)
    assert all(r["same_key"] for r in same)
    # `force` trains again what would come from the cache; the record stays the record
    forced = run_grid("pi", PI, grid, modules=["runner.runs"], force=True, **record)
    assert [r["source"] for r in forced] == ["replayed"] * 3 + ["trained"]


def test_nothing_comes_from_the_record_unless_it_is_asked_for(tmp_path, results, monkeypatch):
    false = [r | {"metrics": {"pi": 0}} for r in results]
    record_runs("pi", false, tmp_path / "expected" / "runs")
    monkeypatch.setattr("kd_notes.runner.grid.data_dir", lambda: tmp_path)
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "empty"))
    grid = [r["params"] for r in results]
    trained = run_grid("pi", PI, grid, modules=["core"])
    assert {r["source"] for r in trained} == {"trained"}
    assert [r["metrics"] for r in trained] == [r["metrics"] for r in results]
    replayed = run_grid("pi", PI, grid, modules=["core"], source="record")
    assert [r["metrics"] for r in replayed] == [{"pi": 0}] * 3
    cached_ones = run_grid("pi", PI, grid, modules=["core"], source="cache")
    assert {r["source"] for r in cached_ones} == {"cached"}


def test_the_cache_alone_never_trains(results, monkeypatch):
    monkeypatch.setattr("kd_notes.runner.runs.estimate_pi", lambda *_: 1 / 0)
    grid = [r["params"] for r in results]
    assert [r["metrics"] for r in run_grid("pi", PI, grid, modules=["core"], source="cache")] == [
        r["metrics"] for r in results
    ]
    asked = []
    with pytest.raises(UserError, match="1 of 4 runs are not in the cache.*seed=9"):
        run_grid(
            "pi",
            PI,
            [*grid, {"draws": 100, "seed": 9}],
            modules=["core"],
            source="cache",
            prepare=asked.append,
        )
    assert asked == []
    for wrong in ({"source": "cache", "force": True}, {"source": "records"}):
        with pytest.raises(UserError, match="source"):
            run_grid("pi", PI, grid, modules=["core"], **wrong)


def test_what_comes_first_is_asked_for_what_will_be_trained_only(results):
    asked = []
    grid = [r["params"] for r in results] + [{"draws": 100, "seed": 9}]
    run_grid("pi", PI, grid, modules=["core"], prepare=asked.extend)
    assert asked == [{"draws": 100, "seed": 9}]
    run_grid("pi", PI, grid, modules=["core"], prepare=asked.extend)
    assert len(asked) == 1


def test_a_notebook_counts_where_its_runs_come_from(tmp_path, results, monkeypatch):
    record_runs("pi", results[:2], tmp_path / "rec")
    grid = [{"draws": 100, "seed": s} for s in range(4)]
    folder = tmp_path / "figure"
    given = {"modules": ["core"], "run_dir": folder}
    record = {"source": "record", "record_folder": tmp_path / "rec"}
    run_grid("pi", PI, grid, **given, **record)
    counts = read_json(folder / "sources.json")
    date = results[0]["date"]
    assert counts == {
        "trained": 1,
        "cached": 1,
        "replayed": 2,
        "record_date": date,
        "code_differs": False,
    }
    # the second call of a notebook finds in the cache what the first has trained
    run_grid("pi", PI, grid, **given, **record)
    assert read_json(folder / "sources.json") == counts
    run_grid("pi", PI, [{"draws": 200, "seed": 0}], **given)
    line = f"2 trained; 1 from the cache; 2 replayed from the record of {date}, same code"
    assert sources_line(folder) == line and sources_line(tmp_path / "none") == "nothing was trained"
    rows = [r | {"key": "older"} for r in results[:2]]
    record_runs("pi", rows, tmp_path / "rec")
    other = {"modules": ["core"], "run_dir": tmp_path / "other"}
    run_grid("pi", PI, grid[:2], **other, **record)
    assert sources_line(tmp_path / "other").endswith("code differs")


def test_force_trains_a_run_once_in_a_notebook(tmp_path, targets, cache):
    grid = [{"seed": 3, "log": str(tmp_path / "calls")}]
    given = {"modules": ["core"], "force": True}
    run_grid("s", "grid_targets:counting", grid, modules=["core"])
    for _ in range(2):
        run_grid("s", "grid_targets:counting", grid, **given, run_dir=tmp_path / "figure")
    assert len(read_jsonl(tmp_path / "calls" / "3.jsonl")) == 2
    for _ in range(2):  # without a notebook, force is force
        run_grid("s", "grid_targets:counting", grid, **given)
    assert len(read_jsonl(tmp_path / "calls" / "3.jsonl")) == 4


def test_record_merges_sorts_and_replaces(tmp_path, results):
    record_runs("pi", results[:2], tmp_path / "rec")
    newer = results[1] | {"metrics": {"pi": 3.0}, "key": "newer"}
    assert record_runs("pi", [results[2], newer], tmp_path / "rec") == 3
    rows = read_jsonl(record_file("pi", tmp_path / "rec"))
    assert [r["params_hash"] for r in rows] == sorted(stable_hash(r["params"]) for r in results)
    assert load_record("pi", tmp_path / "rec")[stable_hash(results[1]["params"])]["key"] == "newer"
    text = record_file("pi", tmp_path / "rec").read_bytes()
    record_runs("pi", results[2:], tmp_path / "rec")
    assert record_file("pi", tmp_path / "rec").read_bytes() == text  # repeating changes nothing
    replayed = [r | {"source": "replayed", "metrics": {"pi": 0}} for r in results]
    record_runs("pi", replayed, tmp_path / "rec")
    assert (
        record_file("pi", tmp_path / "rec").read_bytes() == text
    )  # a replay is no new measurement


def test_cached_runs_are_the_newest_finished_ones(tmp_path, results):
    record_runs("pi", results, tmp_path / "rec")
    text = record_file("pi", tmp_path / "rec").read_bytes()
    with pytest.raises(GridError):
        run_grid("pi", PI, [{"draws": 0, "seed": 0}], modules=["core"])  # failed: not among them
    assert record_runs("pi", cached_runs("pi"), tmp_path / "rec") == 3
    assert record_file("pi", tmp_path / "rec").read_bytes() == text
    later = run_folder("pi", "of-newer-code")
    shutil.copytree(run_folder("pi", results[0]["key"]), later)
    for end, newest in (
        ("2999-01-01T00:00:00+00:00", "of-newer-code"),
        ("1999-01-01T00:00:00+00:00", results[0]["key"]),
    ):
        write_json(later / "manifest.json", read_manifest(later) | {"end": end})
        assert {r["key"] for r in cached_runs("pi") if r["params"] == results[0]["params"]} == {
            newest
        }
    assert cached_runs("nothing") == []


def test_record_refuses_large_and_damaged_rows(tmp_path, results):
    record_runs("pi", results, tmp_path / "rec")
    with pytest.raises(UserError, match="2048"):
        record_runs(
            "pi", [results[0] | {"metrics": {"curve": list(range(2000))}}], tmp_path / "rec"
        )
    assert len(load_record("pi", tmp_path / "rec")) == 3
    path = record_file("pi", tmp_path / "rec")
    rows = read_jsonl(path)
    rows[1]["params"]["seed"] = 99
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match=r"pi\.jsonl:2.*hash"):
        load_record("pi", tmp_path / "rec")
    append_jsonl(path, [{"params": {}}])
    path.write_text(path.read_text().split("\n")[-2] + "\n")
    with pytest.raises(UserError, match=r"pi\.jsonl:1.*metrics"):
        load_record("pi", tmp_path / "rec")
    assert load_record("nothing_recorded", tmp_path / "rec") == {}


def test_two_processes_record_without_losing_rows(tmp_path, cache):
    code = """
import sys
from pathlib import Path
from kd_notes.runner.grid import record_runs
me = int(sys.argv[2])
for n in range(15):
    record_runs("s", [{"params": {"p": me, "n": n}, "metrics": {}, "key": "k", "seconds": 1, "device": "cpu", "date": "d", "source": "trained"}], Path(sys.argv[1]))
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "rec"), str(me)])
        for me in (1, 2)
    ]
    assert [p.wait(timeout=60) for p in both] == [0, 0]
    assert len(load_record("s", tmp_path / "rec")) == 30


def test_an_experiment_without_training_fails_when_it_is_made():
    "Not in the middle of a grid, where runs that it needs have been trained."
    from kd_notes.experiments.base import Experiment

    class Unfinished(Experiment):
        name = "unfinished"

    with pytest.raises(TypeError, match="train"):
        Unfinished()
