"""Several servers with one list of work, streams of rows in bounded memory, and plans. Over real HTTP; one test uses a stub of the back end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from test_server import error, examples, Server
from typer.testing import CliRunner

from kd_notes.cli import app
from kd_notes.core import read_json, read_jsonl, UserError
from kd_notes.data.examples import Example
from kd_notes.experiments.extraction import (
    extract_rationales,
    extract_stream,
    extraction_plan,
    measured_rates,
    Rates,
)
from kd_notes.generation.backends import open_backend
from kd_notes.generation.completions import Decoding, manifest_path
from kd_notes.generation.server import OpenAIBackend
from kd_notes.generation.server_pool import ServerPool
from kd_notes.methods.rationales import extract, rationale_decoding

GOOD = " The sentence says so.\nAnswer: neutral\n\n"


def text(content=GOOD):
    choice = {"index": 0, "finish_reason": "stop", "text": content}
    usage = {"prompt_tokens": 40, "completion_tokens": 9}
    return {"id": "x", "object": "text_completion", "choices": [choice], "usage": usage}


@pytest.fixture
def serve():
    servers = []

    def start(answer=lambda body, n: (200, {}, text())):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def member(server, **options):
    return OpenAIBackend(server.url, "m", **({"retries": 0, "timeout": 10} | options))


def pool_of(*servers, **options):
    return ServerPool([member(server, **options) for server in servers])


def dies_after(lives):
    "Answer `lives` requests and then break every connection."

    def answer(body, n):
        if n > lives:
            raise ConnectionResetError
        time.sleep(0.01)
        return 200, {}, text()

    return answer


def slowly(body, n):
    time.sleep(0.01)
    return 200, {}, text()


def test_one_dies_and_no_row_is_lost_or_written_twice(serve, tmp_path, capfd):
    servers = [serve(dies_after(7)), serve(slowly), serve(slowly)]
    out = tmp_path / "a.jsonl"
    rows = extract(examples(60), pool_of(*servers), rationale_decoding(32), out)
    assert Counter(row["id"] for row in read_jsonl(out)) == Counter(f"e{i}" for i in range(60))
    assert {row["outcome"] for row in rows} == {"ok"}
    assert len(servers[1].calls) > 10 and len(servers[2].calls) > 10
    assert "the other servers go on" in capfd.readouterr().err
    assert read_json(manifest_path(out))["backend"]["host"] == "several servers"


def test_rows_of_a_server_that_hangs_go_to_the_others(serve):
    free = threading.Event()

    def hangs(body, n):
        free.wait(20)
        return 200, {}, text()

    pool = pool_of(serve(hangs), serve(slowly), timeout=0.5, concurrency=3)
    start = time.monotonic()
    answers = list(pool.generate([(f"r{i}", f"p {i}") for i in range(30)], Decoding(8)))
    free.set()
    assert Counter(c.id for c in answers) == Counter(f"r{i}" for i in range(30))
    assert {c.finish for c in answers} == {"stop"} and time.monotonic() - start < 12


def test_when_the_last_one_dies_answers_are_kept_and_the_same_call_goes_on(serve, tmp_path):
    out = tmp_path / "a.jsonl"
    servers = [serve(dies_after(5)), serve(dies_after(9))]
    with pytest.raises(UserError, match="no usable answer"):
        extract(examples(40), pool_of(*servers), rationale_decoding(32), out)
    before = read_jsonl(out)
    assert 5 <= len(before) <= 14 and len({row["id"] for row in before}) == len(before)
    others = [serve(slowly), serve(slowly)]
    rows = extract(examples(40), pool_of(*others), rationale_decoding(32), out)
    assert len(rows) == 40 and read_jsonl(out)[: len(before)] == before
    assert sum(len(server.calls) for server in others) == 40 - len(before)


def test_a_row_that_is_refused_is_an_outcome_and_asked_for_once(serve):
    def answer(body, n):
        if "p 7" in body["prompt"]:
            return 400, {}, error("flagged", code="content_filter")
        return slowly(body, n)

    servers = [serve(answer), serve(answer)]
    done = list(pool_of(*servers).generate([(f"r{i}", f"p {i}.") for i in range(20)], Decoding(8)))
    assert Counter(c.finish for c in done) == {"stop": 19, "refused": 1}
    asked = [call for server in servers for call in server.calls if "p 7" in call["prompt"]]
    assert len(asked) == 1


def test_a_last_row_that_no_server_answers_is_an_outcome_and_no_hang(serve):
    def answer(body, n):
        if "p 9." in body["prompt"]:
            time.sleep(0.5)  # the others are answered meanwhile
            return 503, {}, error("busy")
        return slowly(body, n)

    pool = pool_of(serve(answer), serve(answer))
    start = time.monotonic()
    asked = [(f"r{i}", f"p {i}.") for i in range(10)]
    found = {c.id: c.finish for c in pool.generate(asked, Decoding(8))}
    assert found == {f"r{i}": "unanswered" if i == 9 else "stop" for i in range(10)}
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("bad", [range(5), range(3, 20)])
def test_rows_that_no_server_can_answer_stop_none_of_them(serve, tmp_path, bad):
    def answer(body, n):
        if any(f"number {i}." in body["prompt"] for i in bad):
            return 500, {}, error("crash")
        return slowly(body, n)

    servers = [serve(answer), serve(answer)]
    out = tmp_path / "a.jsonl"
    for _ in range(2):
        rows = extract(examples(24), pool_of(*servers), rationale_decoding(32), out)
        wanted = ["unanswered" if i in bad else "ok" for i in range(24)]
        assert [row["outcome"] for row in rows] == wanted and len(read_jsonl(out)) == 24


def test_rows_set_aside_by_a_server_that_dies_are_answered_by_the_others(serve):
    def dies(body, n):
        return (503, {}, error("dying")) if n > 4 else slowly(body, n)

    servers = [serve(dies), serve(slowly)]
    asked = [(f"r{i}", f"p {i}") for i in range(40)]
    done = list(pool_of(*servers).generate(asked, Decoding(8)))
    assert Counter(c.id for c in done) == Counter(name for name, _ in asked)
    assert {c.finish for c in done} == {"stop"}


def test_an_answer_that_was_asked_for_before_a_failure_is_no_sign_of_life(serve):
    def dies(body, n):
        if n == 1:  # the last answer; it comes after the failure of the second request
            time.sleep(0.3)
            return 200, {}, text()
        if n == 3:
            time.sleep(0.6)
        return 503, {}, error("dying")

    servers = [serve(dies), serve(slowly)]
    asked = [(f"r{i}", f"p {i}") for i in range(40)]
    done = list(pool_of(*servers, concurrency=2).generate(asked, Decoding(8)))
    assert Counter(c.id for c in done) == Counter(name for name, _ in asked)
    assert {c.finish for c in done} == {"stop"}


def test_leaving_early_stops_all_servers(serve):
    servers = [serve(slowly), serve(slowly)]
    work = pool_of(*servers).generate([(f"r{i}", f"p {i}") for i in range(500)], Decoding(8))
    next(work)
    work.close()
    time.sleep(0.3)
    asked = sum(len(server.calls) for server in servers)
    time.sleep(0.3)
    assert asked == sum(len(server.calls) for server in servers) < 100


def test_samples_of_a_row_are_spread_and_all_there(serve):
    servers = [serve(slowly), serve(slowly)]
    asked = [(f"r{i}", f"p {i}") for i in range(10)]
    done = list(pool_of(*servers).generate(asked, Decoding(8, temperature=1.0, n=3)))
    wanted = Counter((f"r{i}", sample) for i in range(10) for sample in range(3))
    assert Counter((c.id, c.sample) for c in done) == wanted


def test_pools_that_cannot_be():
    one = OpenAIBackend("http://127.0.0.1:1/v1", "m")
    with pytest.raises(UserError, match="serve one model"):
        ServerPool([one, OpenAIBackend("http://127.0.0.1:2/v1", "other")])
    with pytest.raises(UserError, match="named twice"):
        ServerPool([one, one])
    with pytest.raises(UserError, match="not a model on a server"):
        open_backend("smollm2", servers=["http://127.0.0.1:1/v1"])
    pool = open_backend("openai:http://127.0.0.1:1/v1#m", servers=["http://127.0.0.1:2/v1"])
    assert len(pool.servers) == 2 and pool.name == "m"


RESUMED = """
import sys
from kd_notes.generation.backends import open_backend
from kd_notes.methods.rationales import extract, rationale_decoding
from kd_notes.data.examples import Example
out, one, two = sys.argv[1:]
rows = [Example(f"e{{i}}", "nli", f"Premise: number {{i}}. Hypothesis: odd.", "neutral") for i in range({count})]
pool = open_backend(f"openai:{{one}}#m", servers=[two], retries=0)
extract(rows, pool, rationale_decoding(32), out)
"""


def test_kill_9_of_the_asking_process_loses_nothing(serve, tmp_path):
    servers = [serve(slowly), serve(slowly)]
    out = tmp_path / "a.jsonl"
    code = RESUMED.format(count=120)
    command = [sys.executable, "-c", code, str(out), *(server.url for server in servers)]
    env = os.environ | {"KD_NOTES_PROGRESS": "off"}
    process = subprocess.Popen(command, env=env)
    while not out.is_file() or out.read_bytes().count(b"\n") < 20:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 20 <= out.read_bytes().count(b"\n") < 120
    subprocess.run(command, env=env, check=True, timeout=60)
    assert Counter(row["id"] for row in read_jsonl(out)) == Counter(f"e{i}" for i in range(120))


# ---------------------------------------------------------------- streams


PEAK = """
import resource, sys
from kd_notes.data.examples import Example
from kd_notes.experiments.extraction import extract_stream
from kd_notes.generation.completions import Completion
from kd_notes.methods.rationales import rationale_decoding

class Stub:
    name, revision = "stub", ""
    def describe(self):
        return {"kind": "stub"}
    def generate(self, requests, decoding):
        for name, prompt in requests:
            yield Completion(name, " A reason." * 20 + "\\nAnswer: neutral\\n\\n", 300, 60, "stop", 0.1)

def source(count):
    for i in range(count):
        yield Example(f"row-{i}", "nli", f"Premise: {i} " + "word " * 400 + "Hypothesis: odd.", "neutral")

out, count = sys.argv[1], int(sys.argv[2])
tally = extract_stream(source(count), Stub(), rationale_decoding(64), out, task="nli")
assert len(tally) == count
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_megabytes(path, count):
    env = os.environ | {"KD_NOTES_PROGRESS": "off"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), str(count)],
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def test_a_hundred_thousand_rows_take_little_more_memory_than_four_thousand(tmp_path):
    "A hundred thousand prompts of 2 kB are 200 MB; what is kept of a row is its key and its hash."
    small = peak_megabytes(tmp_path / "small.jsonl", 4_000)
    large = peak_megabytes(tmp_path / "large.jsonl", 100_000)
    assert (tmp_path / "large.jsonl").stat().st_size > 30e6
    assert large - small < 60, (small, large)


def many(count):
    for i in range(count):
        yield Example(f"e{i}", "nli", f"Premise: number {i}. Hypothesis: odd.", "neutral")


def test_a_stream_over_two_servers_is_the_file_of_a_list(serve, tmp_path):
    servers = [serve(dies_after(40)), serve()]
    out = tmp_path / "a.jsonl"
    how = {"task": "nli", "window": 100}
    tally = extract_stream(many(350), pool_of(*servers), rationale_decoding(32), out, **how)
    assert len(tally) == 350 and tally.outcomes == {"ok": 350}
    assert Counter(row["id"] for row in read_jsonl(out)) == Counter(f"e{i}" for i in range(350))
    asked = len(servers[1].calls)
    again = extract(list(many(350)), pool_of(*servers), rationale_decoding(32), out)
    assert len(again) == 350 and len(servers[1].calls) == asked
    manifest = read_json(manifest_path(out))
    assert manifest["status"] == "done" and manifest["totals"]["completion_tokens"] == 350 * 9


def test_a_stream_refuses_what_a_list_refuses(serve, tmp_path):
    server, out, how = serve(), tmp_path / "a.jsonl", {"task": "nli", "window": 5}

    def stream(rows):
        extract_stream(rows, member(server), rationale_decoding(32), out, **how)

    with pytest.raises(UserError, match="'e1' occurs twice"):
        stream([*many(12), *list(many(2))[1:]])
    changed = [Example("e0", "nli", "Premise: other. Hypothesis: odd.", "neutral")]
    with pytest.raises(UserError, match="has changed since"):
        stream(changed)
    with pytest.raises(UserError, match="no examples"):
        extract_stream([], member(server), rationale_decoding(32), tmp_path / "b.jsonl", **how)
    stream(many(20))
    assert len(read_jsonl(out)) == 20


@pytest.fixture
def task(tmp_path):
    (tmp_path / "task.toml").write_text('name = "moods"\nlabels = ["neutral", "glad"]\n')
    rows = [{"input": f"Row {i}.", "label": "neutral" if i % 4 else "glad"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_command_streams_over_several_servers(serve, task):
    servers = [serve(), serve(slowly)]
    teacher = f"openai:{servers[0].url}#m"
    call = ["extract", "--task", str(task / "task.toml"), "--input", str(task / "rows.jsonl")]
    call += ["--teacher", teacher, "--server", servers[1].url, "--set", "concurrency=2"]
    done = CliRunner().invoke(app, [*call, "--out", str(task / "a.jsonl"), "--stream"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout[done.stdout.index("{") :])
    assert made["rows"] == 40 and made["accuracy"] == 0.75 and made["outcomes"] == {"ok": 40}
    assert len(servers[0].calls) and len(servers[1].calls)
    plain = CliRunner().invoke(app, [*call, "--out", str(task / "a.jsonl")])
    listed = json.loads(plain.stdout[plain.stdout.index("{") :])
    assert {name: listed[name] for name in made} == made
    assert sum(len(server.calls) for server in servers) == 40


def test_a_broken_line_of_a_streamed_file_is_named(serve, task):
    with open(task / "rows.jsonl", "a") as file:
        file.write('{"input": \n')
    teacher = f"openai:{serve().url}#m"
    how = {"source": task / "rows.jsonl", "teacher": teacher, "stream": True}
    with pytest.raises(UserError, match="rows.jsonl:41.*not one JSON object"):
        extract_rationales(task / "task.toml", task / "a.jsonl", **how)


# ---------------------------------------------------------------- plans


def test_a_plan_from_given_rates():
    plan = extraction_plan(1_000_000, Rates(350, 60, 25.0, bytes=800))
    assert plan["prompt_tokens"] == 350_000_000 and plan["completion_tokens"] == 60_000_000
    assert plan["hours"] == 11.11 and plan["shards"] == 20 and plan["gigabytes"] == 0.8
    assert extraction_plan(3, Rates(1, 1, 1.0))["shards"] == 1
    with pytest.raises(UserError, match="rate rows_per_second"):
        Rates(1, 1, 0.0)


def test_a_plan_measures_the_first_rows_and_nothing_is_asked_twice(serve, task):
    server = serve(slowly)
    call = ["extract", "--task", str(task / "task.toml"), "--input", str(task / "rows.jsonl")]
    call += ["--teacher", f"openai:{server.url}#m", "--out", str(task / "a.jsonl")]
    done = CliRunner().invoke(app, [*call, "--plan", "--rate", "rows=100000"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout[done.stdout.index("{") :])
    assert plan["from"] == "16 measured rows" and len(server.calls) == 16
    assert plan["prompt_tokens"] == 4_000_000 and plan["completion_tokens"] == 900_000
    rates = measured_rates(task / "a.jsonl")
    assert plan["hours"] == pytest.approx(100_000 / rates.rows_per_second / 3600, abs=0.01)
    CliRunner().invoke(app, call)
    assert len(server.calls) == 40


def test_a_plan_does_not_take_the_rates_of_another_teacher(serve, task):
    server = serve(slowly)
    call = ["extract", "--task", str(task / "task.toml"), "--input", str(task / "rows.jsonl")]
    call += ["--out", str(task / "a.jsonl"), "--teacher"]
    assert CliRunner().invoke(app, [*call, f"openai:{server.url}#m"]).exit_code == 0
    again = CliRunner().invoke(app, [*call, f"openai:{server.url}#m", "--plan"])
    assert json.loads(again.stdout)["from"] == "40 measured rows" and len(server.calls) == 40
    other = CliRunner().invoke(app, [*call, f"openai:{server.url}#larger", "--plan"])
    assert other.exit_code == 2 and "belongs to another job" in other.output
    assert len(server.calls) == 40


def test_a_plan_from_given_rates_asks_no_server(task):
    call = ["extract", "--task", str(task / "task.toml"), "--input", str(task / "rows.jsonl")]
    call += [
        "--teacher",
        "openai:http://127.0.0.1:1/v1#m",
        "--out",
        str(task / "a.jsonl"),
        "--plan",
    ]
    rates = ["--rate", "prompt_tokens=500", "--rate", "completion_tokens=60"]
    done = CliRunner().invoke(app, [*call, *rates, "--rate", "rows_per_second=8"])
    plan = json.loads(done.stdout)
    assert plan["rows"] == 40 and plan["prompt_tokens"] == 20_000 and plan["from"] == "given rates"
    three = [*call, *rates, "--rate", "rows_per_second=8", "--samples", "3", "--temperature", "1"]
    plan = json.loads(CliRunner().invoke(app, three).stdout)
    assert plan["rows"] == 120 and plan["completion_tokens"] == 7200  # a sample is a row
    assert not (task / "a.jsonl").exists()
    wrong = CliRunner().invoke(app, [*call, *rates])
    assert wrong.exit_code == 2 and "'rows_per_second' is unknown or missing" in wrong.output
