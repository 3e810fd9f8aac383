"""Rows larger than memory: read one by one, encoded once into files, and trained on to the same bit."""

import json
import os
import signal
import time
from itertools import islice

import pytest
import torch

import kd_notes.products.distill as distill_module
from helpers import start_script
from kd_notes.core import read_json, rng, stable_hash, UserError
from kd_notes.data.dialogues import encode_row
from kd_notes.data.rows import load_rows, read_rows, RowFile, RowPart, store_rows
from kd_notes.methods.gkd import GKD, GKDConfig
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.products.distill import distill
from kd_notes.training.batches import batch_order
from kd_notes.training.checkpoint import save_model
from kd_notes.training.loop import train
from kd_notes.training.method import SFT
from kd_notes.training.setup import set_up
from kd_notes.training.state import TrainConfig

TOK = load_mini_tokenizer()
TEXTS = [
    {"prompt": f"Count to {i}.", "completion": " ".join(map(str, range(i)))} for i in range(1, 19)
]
CFG = {"max_steps": 6, "batch_size": 4, "lr": 1e-3, "device": "cpu", "log_every": 1}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- the file of rows ---------------------------------------------------------------------------


def test_a_file_of_rows_is_read_like_a_list(tmp_path):
    lines = [json.dumps(row) for row in TEXTS]
    lines[3:3] = ["", "   "]  # blank lines count in errors, and are no rows
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    rows = RowFile(file, chat=True)
    expected = read_rows(TEXTS, "mine", chat=True)
    assert [row.prompt for row in rows] == [row.prompt for row in expected]
    assert [row.id for row in rows] == [row.id for row in expected]
    assert list(rows) == [rows[i] for i in range(len(rows))] == load_rows(file, chat=True)
    assert rows[3].where == f"{file}:6" and rows[-1] == list(rows)[-1]
    assert list(RowPart.without(rows, [0, 5, 17])) == [
        rows[i] for i in range(18) if i not in (0, 5, 17)
    ]
    assert list(RowFile(file, 4)) == load_rows(file)[:4]
    with pytest.raises(IndexError):
        rows[18]


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"prompt": "a"', "mine.jsonl:19: the row is not one JSON object"),
        ('{"prompt": "a"}', "mine.jsonl:19: the field 'response' is missing"),
        ('{"id": "mine-3", "prompt": "a", "response": "b"}', "an id occurs twice"),
    ],
)
def test_a_bad_row_is_told_before_the_first_is_used(tmp_path, line, message):
    file = write(tmp_path / "mine.jsonl", TEXTS)
    file.write_text(file.read_text() + line)
    with pytest.raises(UserError, match=message):
        RowFile(file)
    if "JSON" in message:  # told even if the row would not be used
        with pytest.raises(UserError, match=message):
            RowFile(file, 2)


# --- stored rows --------------------------------------------------------------------------------


def encoded(**more):
    return [encode_row(row, TOK) | more for row in read_rows(TEXTS)]


def test_stored_rows_are_the_rows_and_belong_to_one_job(tmp_path):
    rows = encoded()
    rows[2] |= {"id": "é\n", "whole": False, "completion": []}
    del rows[3]["whole"]
    stored = store_rows(tmp_path / "rows", {"a": 1}, iter(rows))
    assert list(stored) == rows and stored[-1] == rows[-1] and stored.cut() == 1
    part = stored.part([2, 5, 7]).part([0, 2])
    assert list(part) == [rows[2], rows[7]] and part.name(0) == "é\n"

    def never():
        raise AssertionError("encoded again")
        yield

    assert list(store_rows(tmp_path / "rows", {"a": 1}, never())) == rows
    other = store_rows(tmp_path / "rows", {"a": 2}, iter(rows[:1]))
    assert list(other) == rows[:1]


def test_an_error_among_the_rows_leaves_what_was_there(tmp_path):
    rows = encoded()
    store_rows(tmp_path / "rows", 1, rows)

    def broken():
        yield rows[0]
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        store_rows(tmp_path / "rows", 2, broken())
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    assert list(store_rows(tmp_path / "rows", 1, iter(()))) == rows


# --- training -----------------------------------------------------------------------------------


def test_the_order_of_arrays_is_the_order_of_lists():
    sizes = [7, 3, 9, 3, 5, 2, 8]
    order = list(range(7))
    rng("order", 3, 0).shuffle(order)
    assert list(islice(batch_order(sizes, 7, 3, bucket=False), 1)) == [
        sorted(order, key=sizes.__getitem__)
    ]


def gkd():
    teacher = mini_model("causal", "xxs", len(TOK), seed=5)
    return GKD(TOK, teacher, GKDConfig(rollouts=4, max_new_tokens=4))


@pytest.mark.parametrize("make", [lambda: SFT(TOK), gkd], ids=["sft", "gkd"])
def test_a_training_on_stored_rows_is_equal_to_the_bit(tmp_path, make):
    torch.set_num_threads(1)
    texts = read_rows(TEXTS, chat=True)
    final = [make().encode(row) for row in texts]
    stored = store_rows(tmp_path / "rows", "job", final, final=True)
    weights, histories, identities = [], [], []
    for rows in (texts, stored):
        model = mini_model("causal", "xxs", len(TOK), seed=1)
        state = set_up(model, make(), rows, TrainConfig(**CFG), tmp_path / "run")
        identities.append(state.identity)
        result = train(model, make(), rows, TrainConfig(**CFG))
        histories.append([{k: v for k, v in r.items() if k != "seconds"} for r in result.history])
        weights.append([p.detach().clone() for p in model.parameters()])
    assert histories[0] == histories[1] and identities[0] == identities[1]
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_the_hash_of_the_examples_is_that_of_all_at_once(tmp_path):
    state = set_up(
        mini_model("causal", "xxs", len(TOK), seed=1), SFT(TOK), TEXTS, TrainConfig(**CFG), tmp_path
    )
    items = json.dumps(list(state.items), sort_keys=True)
    assert state.identity["examples"] == stable_hash([state.ids, list(state.sizes), items])


# --- distill ------------------------------------------------------------------------------------

QUICK = {"max_steps": 2, "batch_size": 4, "validation": 4, "evaluations": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for name, seed in (("teacher", 0), ("student", 1)):
        save_model(mini_model("causal", "xxs", len(TOK), seed=seed), folder / name, TOK)
    write(folder / "rows.jsonl", TEXTS)
    return folder


def call(place, out, file="rows.jsonl", **more):
    names = [str(place / name) for name in (file, "teacher", "student")]
    return (*names, "sft", str(out)), QUICK | more


def script(place, out, file="rows.jsonl", after=""):
    arguments, options = call(place, out, file)
    return start_script(
        f"import resource, sys\nfrom kd_notes.products.distill import distill\n"
        f"distill(*{arguments!r}, **{options!r})\n{after}"
    )


@pytest.mark.parametrize(
    "other",
    [
        {"id": "b", "prompt": [1], "completion": None},  # as a row with a prompt alone
        {"id": "b", "prompt": [1]},
        {"id": "b", "prompt": [1], "completion": [2], "ends": [3]},
    ],
)
def test_rows_that_cannot_be_stored_whole_are_not_stored(tmp_path, other):
    first = {"id": "a", "prompt": [1], "completion": [2]}
    with pytest.raises((TypeError, ValueError)):
        store_rows(tmp_path / "rows", "job", [first, other])
    assert not any(tmp_path.iterdir())


def test_a_kill_after_the_encoding_costs_no_second_encoding(place, tmp_path, monkeypatch):
    process = script(place, tmp_path / "killed")
    about = tmp_path / "killed" / ".encoded" / "rows" / "about.json"
    while not about.is_file() and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert about.is_file() and not (tmp_path / "killed" / "report.json").is_file()
    written = about.stat().st_ino
    inner = distill_module.train
    trained = []

    def train_seen(model, method, rows, cfg, **options):
        trained.append((rows.folder / "about.json").stat().st_ino)
        return inner(model, method, rows, cfg, **options)

    monkeypatch.setattr(distill_module, "train", train_seen)
    torch.set_num_threads(1)
    for name in ("killed", "whole"):
        arguments, options = call(place, tmp_path / name)
        distill(*arguments, **options)
    assert trained[0] == written
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert files[0] == files[1] and not (tmp_path / "killed" / ".encoded").exists()


def test_a_kill_while_the_request_is_written_leaves_a_folder_that_serves(place, tmp_path):
    half = tmp_path / "out" / ".request.json.4711-0123abcd.tmp"
    half.parent.mkdir()
    half.write_text('{"data": ')
    arguments, options = call(place, tmp_path / "out")
    assert distill(*arguments, **options)["rows"] > 0
    assert not half.exists()


def test_rows_of_another_call_are_not_used(place, tmp_path):
    "A row that does not fit is told; after it was corrected the same folder serves."
    long = {"prompt": "word " * 900, "completion": "x"}
    bad = write(place / "bad.jsonl", [*TEXTS, long])
    arguments, options = call(place, tmp_path / "out", "bad.jsonl")
    with pytest.raises(UserError, match="bad.jsonl:19: the prompt has"):
        distill(*arguments, **options)
    (tmp_path / "out" / ".encoded" / "rows.part").mkdir(parents=True)  # as a kill leaves it
    write(bad, TEXTS[:12])
    assert distill(*arguments, **options)["rows"] == 8
    assert read_json(tmp_path / "out" / "report.json")["held_out"] == 4


@pytest.mark.skipif(os.name == "nt", reason="resource is not there")
def test_memory_does_not_grow_with_the_rows(place, tmp_path):
    words = " ".join(f"and {i}" for i in range(30))
    peaks = []
    for count in (500, 20_000):
        rows = ({"prompt": f"Say {i}.", "completion": f"{i} {words}"} for i in range(count))
        write(place / f"{count}.jsonl", rows)
        file = tmp_path / f"{count}.txt"
        peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
        unit = "(1024 if sys.platform == 'darwin' else 1)"
        after = f"open({str(file)!r}, 'w').write(str({peak} / {unit}))"
        process = script(place, tmp_path / str(count), f"{count}.jsonl", after)
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        peaks.append(float(file.read_text()) / 1024)
    assert peaks[1] - peaks[0] < 40, peaks  # MB; 20,000 rows of Dolly in memory took 190
