"""Grids on a dask cluster: real schedulers and workers in processes of their own, real kills, no shared disk."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from test_reproduce import make_book, standard

import kd_notes.runner.cluster as cluster_module
from kd_notes.core import read_json, read_jsonl, UserError
from kd_notes.runner.cluster import keep_files, refusal, run_on_worker, surroundings
from kd_notes.runner.code import code_hash, run_key
from kd_notes.runner.grid import GridError, run_grid
from kd_notes.runner.reproduce import reproduce
from kd_notes.runner.runs import read_manifest, read_run, run_folder, run_status
from kd_notes.runner.workers import Task

PI = "kd_notes.runner.runs:estimate_pi"

TARGETS = """
import os, time
from pathlib import Path
from kd_notes.core import append_jsonl, read_jsonl, write_json

def note(params):
    who = {"seed": params["seed"], "dask": os.getppid(), "pid": os.getpid()}
    write_json(Path(params["log"]) / f"{os.getpid()}.json", who)

def steps(params, folder):
    "Logs ten steps, goes on where an earlier attempt stopped, and notes who did it."
    note(params)
    path = folder / "metrics.jsonl"
    done = len(read_jsonl(path, repair_tail=True)) if path.exists() else 0
    for step in range(done, 10):
        append_jsonl(path, [{"step": step}])
        time.sleep(params.get("pause", 0))
    return {"resumed_at": done, "seed": params["seed"]}

def deadly(params, folder):
    "Kills the dask worker that runs it."
    note(params)
    os.kill(os.getppid(), 9)
    time.sleep(60)

def leave(address, dask_worker):
    "Ends the dask worker with this address; the others are here."
    if dask_worker.address == address:
        os._exit(1)
    return "here"

class Shop:
    def inputs(self, run):
        return {"wares": os.environ.get("WARES", "none")}

    @classmethod
    def run_one(cls, run, folder):
        return {"x": run["seed"]}
"""

START = """
import sys, time
from distributed import LocalCluster
if __name__ == "__main__":
    cluster = LocalCluster(n_workers=int(sys.argv[1]), threads_per_worker=1, processes=True, dashboard_address=None)
    print(cluster.scheduler_address, flush=True)
    time.sleep(600)
"""


# Each worker is a job, as under SLURM; here a job is a process that a job script's command starts.
JOBS = """
import sys, time
from dask_jobqueue.local import LocalCluster
if __name__ == "__main__":
    options = {"dashboard_address": None, "host": "tcp://127.0.0.1"}
    cluster = LocalCluster(cores=1, processes=1, memory="1GB", scheduler_options=options)
    cluster.scale(jobs=int(sys.argv[1]))
    print(cluster.scheduler_address, flush=True)
    time.sleep(600)
"""


class Started:
    "A LocalCluster in a process of its own, whose scheduler can be killed without mercy."

    def __init__(self, folder: Path, workers: int, program: str = START):
        (folder / "lib").mkdir(parents=True)
        (folder / "lib" / "cluster_targets.py").write_text(TARGETS)
        (folder / "start.py").write_text(program)
        paths = os.pathsep.join([str(folder / "lib"), os.environ.get("PYTHONPATH", "")])
        env = {"KD_NOTES_CACHE": str(folder / "theirs"), "PYTHONPATH": paths, "WARES": "apples"}
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "start.py"), str(workers)],
            env=os.environ | env,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.address = self.process.stdout.readline().strip()
        self.theirs = folder / "theirs"
        self.lib = str(folder / "lib")

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    started = Started(tmp_path_factory.mktemp("cluster"), 2)
    yield started
    started.end()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KD_NOTES_PROGRESS", "off")
    monkeypatch.delenv("KD_NOTES_EXECUTOR", raising=False)
    return tmp_path / "cache"


def grid_of(tmp_path, seeds, **more):
    return [{"seed": s, "log": str(tmp_path / "calls")} | more for s in seeds]


def calls(tmp_path) -> list[dict]:
    "Return who ran which seed, in any order."
    return [read_json(path) for path in (tmp_path / "calls").glob("*.json")]


def status_of(grid, stage="s"):
    keys = [run_key(stage, params, ["core"]) for params in grid]
    return Counter(run_status(run_folder(stage, key)) for key in keys)


def test_a_cluster_gives_the_numbers_and_keys_of_this_machine(two, cache, monkeypatch):
    grid = [{"draws": 1000, "seed": seed} for seed in range(5)]
    there = run_grid("pi", PI, grid, modules=["runner.runs"], executor=f"dask:{two.address}")
    assert {r["source"] for r in there} == {"trained"}
    assert not list((cache / "cluster").iterdir())
    here = run_grid("pi", PI, grid, modules=["runner.runs"], source="cache")
    assert [r["metrics"] for r in here] == [r["metrics"] for r in there]
    assert [r["key"] for r in here] == [r["key"] for r in there]
    again = run_grid("pi", PI, grid, modules=["runner.runs"], force=True)
    assert [r["metrics"] for r in again] == [r["metrics"] for r in there]
    monkeypatch.setenv("KD_NOTES_EXECUTOR", f"dask:{two.address}")
    manifest = read_manifest(run_folder("pi", here[0]["key"]))
    run_grid("pi", PI, grid[:1], modules=["runner.runs"], force=True)  # the environment chose
    assert read_manifest(run_folder("pi", here[0]["key"]))["pid"] != manifest["pid"] == os.getpid()


@pytest.mark.slow
def test_workers_that_are_jobs_of_a_queue_run_the_grid(tmp_path, monkeypatch):
    pytest.importorskip("dask_jobqueue")
    started = Started(tmp_path / "jobs", 2, JOBS)
    monkeypatch.syspath_prepend(started.lib)
    try:
        grid = grid_of(tmp_path, range(2), pause=0.02)
        found = run_grid(
            "s", "cluster_targets:steps", grid, modules=["core"], executor=f"dask:{started.address}"
        )
    finally:
        started.end()
    assert [r["metrics"] for r in found] == [{"resumed_at": 0, "seed": s} for s in range(2)]
    assert {r["source"] for r in found} == {"trained"} and status_of(grid) == {"done": 2}
    assert os.getpid() not in {call["dask"] for call in calls(tmp_path)}


def test_a_worker_killed_in_mid_run_loses_nothing(two, tmp_path, monkeypatch):
    "Two workers, four runs; one worker is killed with signal 9 while its run is at work."
    monkeypatch.syspath_prepend(two.lib)
    grid = grid_of(tmp_path, range(4), pause=0.5)
    victim = None

    def kill_one() -> None:
        nonlocal victim
        for call in calls(tmp_path) if victim is None else ():
            key = run_key("s", grid[call["seed"]], ["core"])
            log = run_folder("s", key) / "metrics.jsonl"
            if victim is None and log.exists() and 3 <= log.read_text().count("\n") <= 6:
                victim = call
                os.kill(victim["dask"], signal.SIGKILL)

    watch = cluster_module.Cluster.outcomes

    def outcomes(self, client):
        for event in watch(self, client):  # None about once a second
            kill_one()
            yield event

    monkeypatch.setattr(cluster_module.Cluster, "outcomes", outcomes)
    results = run_grid(
        "s", "cluster_targets:steps", grid, modules=["core"], executor=f"dask:{two.address}"
    )
    assert [r["metrics"]["seed"] for r in results] == [*range(4)] and victim
    assert status_of(grid) == {"done": 4}
    attempts = Counter(call["seed"] for call in calls(tmp_path))
    lost = victim["seed"]  # the next worker went on where the lost one was
    assert attempts == Counter([*range(4), lost])
    assert read_manifest(run_folder("s", results[lost]["key"]))["attempts"] == 2
    assert results[lost]["metrics"]["resumed_at"] >= 3
    assert all(len(read_jsonl(run_folder("s", r["key"]) / "metrics.jsonl")) == 10 for r in results)


def test_a_worker_that_leaves_while_it_is_asked_is_no_error(two, monkeypatch):
    "An adaptive cluster ends idle workers at any time, also between two grids of a notebook."
    monkeypatch.syspath_prepend(two.lib)
    from cluster_targets import leave

    with cluster_module.connect(two.address) as client:
        client.wait_for_workers(2, timeout=60)
        victim, other = client.scheduler_info()["workers"]
        assert cluster_module.ask_workers(client, leave, victim) == {other: "here"}
        with pytest.raises(UserError, match="a worker cannot run kd_notes .*invalid literal"):
            cluster_module.ask_workers(client, int, "no number")


def test_a_run_that_kills_every_worker_is_one_failed_run(two, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(two.lib)
    grid = grid_of(tmp_path, [0])
    with pytest.raises(GridError, match="each worker that took it died"):
        run_grid(
            "s", "cluster_targets:deadly", grid, modules=["core"], executor=f"dask:{two.address}"
        )
    assert len(calls(tmp_path)) == 4


def test_without_a_shared_disk_the_files_of_a_run_travel(two, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(two.lib)
    monkeypatch.setattr(cluster_module, "sees_cache", lambda order: False)  # here, not there
    hidden = cluster_module.Session.order
    elsewhere = {"cache": str(tmp_path / "of another machine")}
    monkeypatch.setattr(
        cluster_module.Session, "order", lambda self, task: hidden(self, task) | elsewhere
    )
    grid = grid_of(tmp_path, [3, 4])
    results = run_grid(
        "s", "cluster_targets:steps", grid, modules=["core"], executor=f"dask:{two.address}"
    )
    assert [r["metrics"]["seed"] for r in results] == [3, 4] and status_of(grid) == {"done": 2}
    for result in results:
        mine = run_folder("s", result["key"])
        theirs = two.theirs / "runs" / "s" / result["key"]
        names = {path.name for path in mine.iterdir()}
        assert names == {path.name for path in theirs.iterdir()} and "log.txt" in names
        assert read_run(mine) == read_run(theirs) == result["metrics"]
        assert len(read_jsonl(mine / "metrics.jsonl")) == 10
    cached = run_grid("s", "cluster_targets:steps", grid, modules=["core"], source="cache")
    assert [r["metrics"] for r in cached] == [r["metrics"] for r in results]
    with pytest.raises(UserError, match="sent the file"):
        keep_files(tmp_path / "run", {"../run2/manifest.json": b"{}"})


def test_data_libraries_and_code_of_a_worker_must_be_those_of_the_key(two, monkeypatch, capsys):
    monkeypatch.syspath_prepend(two.lib)
    options = {"modules": ["core"], "executor": f"dask:{two.address}"}
    shop = "cluster_targets:Shop.run_one"
    with pytest.raises(GridError, match="wares: the data of this machine are not those"):
        run_grid("s", shop, [{"seed": 1}], checksums={"wares": "pears"}, **options)
    [result] = run_grid("s", shop, [{"seed": 1}], checksums={"wares": "apples"}, **options)
    assert result["metrics"] == {"x": 1}
    here = surroundings()
    monkeypatch.setattr(cluster_module, "surroundings", lambda: here | {"numpy": "0.1"})
    run_grid("s", shop, [{"seed": 2}], checksums={"wares": "apples"}, **options)
    told = capsys.readouterr().err
    assert told.count(f"a worker has numpy {here['numpy']} (here 0.1)") == 1
    monkeypatch.setattr(cluster_module, "surroundings", lambda: here | {"torch": "1.0"})
    with pytest.raises(UserError, match=r"tcp://.*: the worker has torch .* \(here 1.0\)"):
        run_grid("s", shop, [{"seed": 3}], checksums={"wares": "apples"}, **options)
    monkeypatch.setattr(cluster_module, "surroundings", lambda: here)
    facts = {"code": code_hash("core", tables=False), "checksums": {}}
    task = Task("s", shop, {"seed": 1}, "key", facts, ["core"])
    assert refusal({"task": vars(task), "surroundings": here}) == ""
    other = [vars(task) | {"manifest": {"code": "0"}}, vars(task) | {"modules": ["gone"]}]
    for changed in other:
        order = {"task": changed, "surroundings": here}
        assert refusal(order) == "the worker has other code of kd_notes"
        assert run_on_worker(order)["outcome"]["error"] == refusal(order)  # one that joins later


def test_a_scheduler_that_dies_costs_no_finished_run(two, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(two.lib)
    short = Started(tmp_path / "short", 1)
    grid = grid_of(tmp_path, [0, 1]) + grid_of(tmp_path, [2, 3], pause=60)
    watch = cluster_module.Cluster.outcomes

    def outcomes(self, client):
        done = 0
        for event in watch(self, client):
            done += event is not None
            if done == 2:
                os.kill(short.process.pid, signal.SIGKILL)
            yield event

    monkeypatch.setattr(cluster_module.Cluster, "outcomes", outcomes)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        run_grid(
            "s", "cluster_targets:steps", grid, modules=["core"], executor=f"dask:{short.address}"
        )
    text = str(caught.value)
    assert text.startswith(f"{short.address}: the scheduler has gone; 2 of 4 runs are finished")
    assert "run the same command" in text and time.monotonic() - start < 30
    short.end()
    monkeypatch.setattr(cluster_module.Cluster, "outcomes", watch)
    finished = grid[:2]
    assert status_of(finished) == {"done": 2}
    results = run_grid(
        "s", "cluster_targets:steps", finished, modules=["core"], executor=f"dask:{two.address}"
    )
    assert [r["source"] for r in results] == ["cached", "cached"]


def test_ctrl_c_ends_the_runs_on_the_cluster(two, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(two.lib)
    grid = grid_of(tmp_path, [0], pause=60)
    watch = cluster_module.Cluster.outcomes

    def outcomes(self, client):
        for event in watch(self, client):
            if calls(tmp_path):
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(cluster_module.Cluster, "outcomes", outcomes)
    with pytest.raises(KeyboardInterrupt):
        run_grid(
            "s", "cluster_targets:steps", grid, modules=["core"], executor=f"dask:{two.address}"
        )
    pid = calls(tmp_path)[0]["pid"]
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the run goes on for nobody"
        time.sleep(0.1)
    assert status_of(grid) == {"killed": 1}


@pytest.mark.parametrize(
    "executor, words",
    [
        ("dask", "is not an executor"),
        ("dask:somewhere", "is not an executor"),
        ("slurm:here", "is not an executor"),
        ("dask:none.json", "no such scheduler file"),
        ("dask:tcp://127.0.0.1:9", "no dask scheduler answers"),
    ],
)
def test_a_wrong_address_is_one_clear_error(executor, words, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster_module, "PATIENCE", 1)
    with pytest.raises(UserError, match=words):
        run_grid("pi", PI, [{"draws": 1, "seed": 0}], modules=["core"], executor=executor)
    book = make_book(tmp_path, small=standard())
    with pytest.raises(UserError, match=words):
        reproduce(profile="smoke", book=book, executor=executor)
    assert not (tmp_path / "runs").exists()


def test_a_notebook_trains_on_the_cluster_under_an_unchanged_key(two, tmp_path, cache):
    training = f"""
from kd_notes.runner.grid import run_grid
results = run_grid("pi", "{PI}", [{{"draws": 10, "seed": 0}}], modules=["runner.runs"], run_dir=run_dir)
"""
    scheduler_file = tmp_path / "scheduler.json"
    scheduler_file.write_text('{"address": "%s"}' % two.address)
    book = make_book(tmp_path, small=standard(training))
    options = {"profile": "smoke", "book": book}
    [outcome] = reproduce(executor=f"dask:{scheduler_file}", **options)
    assert outcome.status == "done", outcome.message
    assert read_json(outcome.folder / "sources.json")["trained"] == 1
    [run] = (cache / "runs" / "pi").iterdir()
    assert read_manifest(run)["status"] == "done"
    assert (run / "log.txt").is_file()  # a process of the cluster's made it, not the notebook's
    assert reproduce(**options)[0].status == "unchanged"  # the executor is not in the key
