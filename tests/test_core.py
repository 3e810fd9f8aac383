"""kd_notes.core: errors, files that survive kills and full disks, hashes, seeds, progress."""

import json
import os
import pickle
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kd_notes.core as core_module
import kd_notes.progress as progress_module
from kd_notes.core import (
    append_jsonl,
    atomic_write,
    cache_dir,
    canonical_json,
    data_dir,
    expect_error,
    nbs_dir,
    read_json,
    read_jsonl,
    repo_root,
    rng,
    seed_everything,
    sha256_file,
    sha256_text,
    stable_hash,
    to_jsonable,
    UserError,
    write_json,
)
from kd_notes.checksums import verify_checksums, write_checksums
from kd_notes.progress import human_seconds, Meter, progress, progress_mode


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | env,
        timeout=120,
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
rows = st.lists(
    st.dictionaries(st.text(max_size=5), json_values, max_size=3), min_size=1, max_size=5
)


# --- errors ---------------------------------------------------------------------------------------------------------------------


def test_user_error_is_one_paragraph_and_survives_pickling():
    e = UserError("a\nb", where="f.jsonl:3", fix="mend\nit")
    assert str(e) == "f.jsonl:3: a b. mend it"
    again = pickle.loads(pickle.dumps(e))
    assert (str(again), again.what, again.where, again.fix) == (str(e), e.what, e.where, e.fix)
    assert str(UserError("no more")) == "no more."


def test_expect_error_fails_without_an_error_and_on_the_wrong_one():
    with pytest.raises(AssertionError, match="nothing went wrong"), expect_error():
        pass
    with pytest.raises(AssertionError, match="should contain"), expect_error(match="other"):
        raise UserError("this")
    with pytest.raises(KeyError), expect_error(UserError):
        raise KeyError("not a user error")


# --- places ---------------------------------------------------------------------------------------------------------------------


def test_places_in_a_checkout(tmp_path, monkeypatch):
    root = Path(core_module.__file__).resolve().parent.parent
    assert repo_root() == root and data_dir() == root / "data" and nbs_dir() == root / "nbs"
    monkeypatch.delenv("KD_NOTES_CACHE", raising=False)
    assert cache_dir() == root / ".cache"
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == (tmp_path / "a" / "b").resolve() and cache_dir().is_dir()


def test_light_imports_stay_light():
    "core and runs must not drag in torch or anything else that takes a second."
    heavy = "torch", "transformers", "pandas", "matplotlib", "sklearn", "IPython"
    done = python(
        f"import sys, kd_notes.core, kd_notes.runner.runs; print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


# --- atomic files ---------------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from kd_notes.core import atomic_write
print("ready", flush=True)
while True:
    for letter in "ab":
        atomic_write(sys.argv[1], letter*3_000_000)
"""


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path):
    "kill -9 at eight random moments of an endless rewriting, with a reader looking all the time."
    path, seen = tmp_path / "big.txt", set()
    atomic_write(path, "a" * 3_000_000)
    for attempt in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        until = time.monotonic() + random.Random(attempt).uniform(0.005, 0.08)
        while time.monotonic() < until:
            text = path.read_text()
            assert len(text) == 3_000_000 and len(set(text)) == 1
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        text = path.read_text()
        assert len(text) == 3_000_000 and len(set(text)) == 1
        seen.add(text[0])
    assert seen <= {"a", "b"}


@pytest.fixture
def small_disk(tmp_path):
    "A real file system of 64 KiB."
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
        )
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("mounting is not permitted here; the file size limit test covers the same code")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_the_old_file_and_leaves_no_litter(small_disk):
    path = small_disk / "metrics.json"
    write_json(path, {"accuracy": 0.5})
    with pytest.raises(UserError, match="metrics.json.*No space left.*Free some space"):
        atomic_write(path, "x" * 100_000)
    assert read_json(path) == {"accuracy": 0.5}
    assert [p.name for p in small_disk.iterdir()] == ["metrics.json"]


def test_full_disk_appends_all_rows_or_none(small_disk):
    path = small_disk / "rows.jsonl"
    append_jsonl(path, [{"id": 1}])
    with pytest.raises(UserError, match="rows.jsonl.*No space left"):
        append_jsonl(path, [{"id": i, "text": "x" * 1000} for i in range(2, 200)])
    assert read_jsonl(path) == [{"id": 1}]
    append_jsonl(path, [{"id": 2}])
    assert [r["id"] for r in read_jsonl(path)] == [1, 2]


def test_file_size_limit_is_reported_like_a_full_disk(tmp_path):
    code = f"""
import os, resource
from kd_notes.core import append_jsonl, atomic_write, UserError, write_json
os.chdir({str(tmp_path)!r})
append_jsonl("rows.jsonl", [{{"id": 1}}]); write_json("old.json", [1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (lambda: atomic_write("old.json", "x"*9999), lambda: append_jsonl("rows.jsonl", [{{"text": "x"*999}}]*9)):
    try: write()
    except UserError as e: print(e)
"""
    lines = python(code).stdout.splitlines()
    assert len(lines) == 2 and all("Free some space" in line for line in lines), lines
    assert read_json(tmp_path / "old.json") == [1] and read_jsonl(tmp_path / "rows.jsonl") == [
        {"id": 1}
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.json", "rows.jsonl"]


def test_a_folder_in_the_way_is_a_user_error(tmp_path):
    (tmp_path / "out.json").mkdir()
    with pytest.raises(UserError, match="out.json"):
        write_json(tmp_path / "out.json", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


# --- JSON and JSONL -------------------------------------------------------------------------------------------------------------


@given(value=json_values)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
def test_json_round_trip(tmp_path, value):
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value


def test_numbers_of_numpy_and_torch_become_plain():
    value = {
        "a": np.float32(0.5),
        "b": np.arange(2),
        "c": torch.tensor(3),
        "d": {2, 1},
        "e": np.bool_(True),
        5: Path("x") / "y",
    }
    assert to_jsonable(value) == {"a": 0.5, "b": [0, 1], "c": 3, "d": [1, 2], "e": True, "5": "x/y"}


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), np.float64("nan"), torch.tensor(float("nan")), object()]
)
def test_what_json_cannot_hold_is_refused_by_name(tmp_path, bad):
    path = tmp_path / "m.json"
    write_json(path, {"old": 1})
    with pytest.raises(UserError, match=r"loss\.label"):
        write_json(path, {"loss": {"label": bad}})
    assert read_json(path) == {"old": 1}


def test_broken_json_names_file_and_line(tmp_path):
    (tmp_path / "p.json").write_text('{\n "a": 1,\n "b" 2\n}')
    with pytest.raises(UserError, match=r"p\.json:3"):
        read_json(tmp_path / "p.json")
    (tmp_path / "latin.json").write_bytes(b'{\n "a": "\xe9"\n}')
    with pytest.raises(UserError, match=r"latin\.json:2: .*UTF-8"):
        read_json(tmp_path / "latin.json")
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "bom.json") == {"a": 1}


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"lr": 1, "lr": 2}', "'lr' occurs 2 times"),
        ('{"a": {"b": 1, "b": 1}}', "'b' occurs 2 times"),
        ('{"text": "hi \\ud83d"}', "half a character"),
        ('{"\\uDE00": 1}', "half a character"),
        ("[" * 100_000, "nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", "4300 digits"),
        ("", "not valid JSON"),
    ],
)
def test_json_that_would_lose_data_later_is_refused_where_it_is_read(tmp_path, text, said):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_json(tmp_path / "p.json")
    if text.startswith("{"):
        (tmp_path / "p.jsonl").write_text('{"id": 1}\n' + text + "\n")
        with pytest.raises(UserError, match=said) as caught:
            read_jsonl(tmp_path / "p.jsonl")
        assert "p.jsonl:2" in str(caught.value)


def test_whole_characters_and_escaped_backslashes_pass(tmp_path):
    (tmp_path / "p.json").write_text(r'["\ud83d\ude00", "\\ud83d"]')
    assert read_json(tmp_path / "p.json") == ["\U0001f600", "\\ud83d"]


def test_half_a_character_is_not_written(tmp_path):
    for write in (write_json, lambda path, value: append_jsonl(path, [value])):
        with pytest.raises(UserError, match="half a character"):
            write(tmp_path / "p", {"a": "cut \ud83d"})
        assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("name", ["missing.json", ".", "below/a.json", "a\0b.json"])
@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_what_is_no_file_is_one_clear_error(tmp_path, name, read):
    (tmp_path / "below").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / name)


@given(first=rows, second=rows, data=st.data())
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80
)
def test_a_writer_killed_at_any_byte_loses_at_most_the_row_it_was_writing(
    tmp_path, first, second, data
):
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    append_jsonl(path, first)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    complete = first[: whole[:cut].count(b"\n") + (whole[cut : cut + 1] == b"\n")]
    assert read_jsonl(path, repair_tail=True) == complete
    append_jsonl(path, second)
    assert read_jsonl(path) == complete + second


def test_a_half_row_in_a_very_long_line_is_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"id": 1}])
    with open(path, "a") as f:
        f.write('{"text": "' + "x" * 20_000)
    append_jsonl(path, [{"id": 2}])
    assert read_jsonl(path) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize("line, said", [("{bad", "rows.jsonl:2"), ("[1]", "list"), ("7", "int")])
def test_a_broken_row_in_the_middle_is_never_skipped(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"id": 1}}\n{line}\n{{"id": 3}}\n')
    for repair in (False, True):
        with pytest.raises(UserError, match=said) as e:
            read_jsonl(path, repair_tail=repair)
        assert "rows.jsonl:2" in str(e.value)


def test_a_complete_but_broken_last_row_is_an_error_even_with_repair(tmp_path):
    "A killed writer leaves no newline behind a half row; a newline means that somebody wrote the row like this."
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(UserError, match="rows.jsonl:2"):
        read_jsonl(tmp_path / "rows.jsonl", repair_tail=True)


def test_killed_appender_resumes_without_loss_or_repetition(tmp_path):
    "A real process appends ids, is killed again and again, and each time goes on behind the last row on the disk."
    path = tmp_path / "rows.jsonl"
    code = """
import sys
from kd_notes.core import append_jsonl, read_jsonl
from pathlib import Path
path = Path(sys.argv[1])
n = len(read_jsonl(path, repair_tail=True)) if path.exists() else 0
while n < 3000:
    append_jsonl(path, [{"id": n, "text": "é"*500}]); n += 1
    if n % 50 == 0: print(n, flush=True)
"""
    kills = 0
    while True:
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
        )
        lines = [writer.stdout.readline() for _ in range(3)]
        if not lines[-1] or kills == 5:
            writer.wait()
            if len(read_jsonl(path, repair_tail=True)) == 3000:
                break
            continue
        writer.kill()
        writer.wait()
        kills += 1
    assert kills == 5 and [r["id"] for r in read_jsonl(path)] == list(range(3000))


# --- hashes and seeds -----------------------------------------------------------------------------------------------------------


@given(value=st.dictionaries(st.text(), json_values, max_size=5), seed=st.integers(0, 99))
def test_hash_ignores_the_order_of_keys(value, seed):
    keys = list(value)
    random.Random(seed).shuffle(keys)
    assert stable_hash({k: value[k] for k in keys}) == stable_hash(value)
    assert json.loads(canonical_json(value)) == value


def test_hashes_and_streams_do_not_depend_on_the_process():
    code = "from kd_notes.core import rng, stable_hash; print(stable_hash({'b': [1, 'é'], 'a': None}), rng('x', 1).random())"
    answers = {python(code, PYTHONHASHSEED=str(n)).stdout for n in (0, 1, 2)}
    assert answers == {f"{stable_hash({'a': None, 'b': (1, 'é')})} {rng('x', 1).random()}\n"}


def test_hash_known_values(tmp_path):
    "Pinned: a change here would make every cache and every recorded key stale without a word."
    assert sha256_text("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    atomic_write(tmp_path / "abc", "abc")
    assert sha256_file(tmp_path / "abc") == sha256_text("abc")
    assert canonical_json({"b": (1, 2.0), "a": "é"}) == '{"a":"é","b":[1,2.0]}'
    assert stable_hash({"b": (1, 2.0), "a": "é"}) == sha256_text('{"a":"é","b":[1,2.0]}')[:16]


def test_checksums(tmp_path):
    for name in ("a.txt", "sub/b.txt"):
        atomic_write(tmp_path / name, name)
    sums = write_checksums(tmp_path)
    assert list(sums) == ["a.txt", "sub/b.txt"] and verify_checksums(tmp_path) == sums
    atomic_write(tmp_path / "a.txt", "changed")
    with pytest.raises(UserError, match=r"a\.txt.*differs"):
        verify_checksums(tmp_path)
    assert verify_checksums(tmp_path, ["sub/b.txt"]) == {"sub/b.txt": sums["sub/b.txt"]}
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match="missing"):
        verify_checksums(tmp_path)
    with pytest.raises(UserError, match="no checksum"):
        verify_checksums(tmp_path, ["c.txt"])
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(UserError, match="checksums.json"):
        verify_checksums(tmp_path)


def test_seed_everything_covers_python_numpy_and_torch():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(11)
    first = draw()
    assert draw() != first
    seed_everything(11)
    assert draw() == first
    for bad in (-1, 2**32, 1.5, True, "1"):
        with pytest.raises(UserError, match="seed"):
            seed_everything(bad)


def test_streams_are_independent_of_the_global_one_and_of_each_other():
    seed_everything(0)
    first = rng("a").random()
    random.random()
    assert rng("a").random() == first
    streams = [rng("a", n).random() for n in range(100)]
    assert len(set(streams)) == 100 and 0.35 < sum(streams) / 100 < 0.65
    assert rng("a", 1).random() != rng("a", "1").random() != rng("a1").random()


# --- progress -------------------------------------------------------------------------------------------------------------------


def test_progress_mode_follows_the_stream_and_the_environment(monkeypatch):
    monkeypatch.delenv("KD_NOTES_PROGRESS", raising=False)
    master, slave = pty.openpty()
    with open(slave, "w") as terminal, open(os.devnull, "w") as log:
        assert (progress_mode(terminal), progress_mode(log)) == ("bar", "lines")
        monkeypatch.setenv("KD_NOTES_PROGRESS", "off")
        assert progress_mode(terminal) == "off"
    os.close(master)
    monkeypatch.setenv("KD_NOTES_PROGRESS", "loud")
    with pytest.raises(UserError, match="KD_NOTES_PROGRESS"):
        progress_mode()


def test_a_log_gets_lines_at_the_interval_and_a_last_one(monkeypatch):
    import io

    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    log = io.StringIO()
    for _ in Meter(range(60), total=60, desc="train", unit="step", file=log):
        now[0] += 1
    lines = log.getvalue().splitlines()
    assert len(lines) == 6  # 60 seconds, a line every 10, the last one being the final state
    assert lines[0] == "train: 10/60 step in 10 s (1 step/s), about 50 s left"
    assert lines[-1] == "train: 60/60 step in 1 min 00 s (1 step/s)"


@pytest.mark.parametrize("mode", ["bar", "lines", "off"])
def test_progress_passes_items_and_errors_through(mode, capsys):
    items = [object(), object()]
    assert list(progress(items, mode=mode)) == items
    with pytest.raises(ZeroDivisionError):
        for _ in progress(items, mode=mode):
            1 / 0
    with progress(total=4, mode=mode) as bar:
        bar.update(3)
        bar.set_postfix_str("loss 0.1")
        assert bar.n == 3


def test_human_seconds():
    values = {
        0: "0.0 s",
        0.04: "0.0 s",
        9.94: "9.9 s",
        9.96: "10 s",
        59.4: "59 s",
        59.6: "1 min 00 s",
        3599: "59 min 59 s",
        3600: "1 h 00 min",
        90061: "25 h 01 min",
    }
    assert {s: human_seconds(s) for s in values} == values


@pytest.mark.parametrize(
    "name, extra",
    [
        ("papermill", "notebooks"),
        ("sklearn.linear_model", "notebooks"),
        ("datasets", "hub"),
        ("nbdev", "dev"),
    ],
)
def test_a_missing_library_names_its_extra(name, extra):
    error = core_module.missing_library(ModuleNotFoundError(f"No module named {name!r}", name=name))
    assert name.partition(".")[0] in str(error) and f"kd_notes[{extra}]" in str(error)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (OSError("\n  late\nmore"), "late"),
        (RuntimeError(""), "RuntimeError"),
        (TypeError(), "TypeError"),
    ],
)
def test_the_first_line_of_an_error_is_never_missing(error, line):
    from kd_notes.core import first_line

    assert first_line(error) == line
