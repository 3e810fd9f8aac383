"""Prompts, parsing, extraction that is killed, votes and filters."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kd_notes.methods.rationale_filters as filters_module
import kd_notes.methods.rationales as rationales_module
from kd_notes.generation.backends import LocalBackend, ReplayBackend
from kd_notes.generation.completions import Completion, Decoding, manifest_path
from kd_notes.core import append_jsonl, read_json, read_jsonl, UserError, write_json
from kd_notes.data.answers import equation_value
from kd_notes.data.examples import Example, register_task, task_info, TaskInfo, TASKS
from kd_notes.experiments.extraction import _score
from kd_notes.models.mini import mini_model, train_mini_tokenizer
from kd_notes.methods.rationale_filters import rationale_report, select
from kd_notes.methods.rationales import (
    clean_label,
    compare_rows,
    END,
    extract,
    few_shot,
    format_completion,
    format_prompt,
    OUTCOMES,
    parse_completion,
    parse_for,
    Parsed,
    Prompt,
    rationale_decoding,
    vote,
    with_rationales,
    ZERO_SHOT,
)

torch.set_num_threads(1)
PLACES = ("pond", "attic", "oven", "barn")
SHOT = Example(
    "s",
    "cqa",
    "Question: Where is an old lamp? Choices: pond, attic, oven, barn",
    "attic",
    "Old things are stored. An attic stores.",
    PLACES,
)


def question(i):
    return Example(
        f"q{i}",
        "cqa",
        f"Question: Where is heron {i}? Choices: {', '.join(PLACES)}",
        PLACES[i % 4],
        "",
        PLACES,
    )


# ---------------------------------------------------------------- layout

words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp")),
    min_size=1,
    max_size=30,
).filter(str.strip)


@given(rationale=words, label=st.sampled_from(PLACES), text=words)
def test_what_is_trained_on_is_what_is_parsed(rationale, label, text):
    example = replace(SHOT, input=text, rationale=rationale, label=label)
    if "Answer:" not in rationale:
        assert parse_for(example, format_completion(example)) == Parsed(
            "ok", rationales_module.one_line(rationale), label
        )
    assert (
        format_prompt(example) + format_completion(example)
        == format_prompt(SHOT, [example])[: -len(format_prompt(SHOT))]
    )


def test_shots_are_separated_by_the_text_that_stops():
    prompt = Prompt("Do it.", (SHOT, replace(SHOT, input="Question: a\n\nb?")))(question(1))
    assert prompt.split(END)[0] == "Do it." and len(prompt.split(END)) == 4
    assert prompt.endswith(f"{question(1).input}\nReasoning:")
    assert rationale_decoding().stop == (END,)


@pytest.mark.parametrize("part", ["rationale", "label"])
def test_an_incomplete_example_cannot_be_shown(part):
    with pytest.raises(UserError, match=f"example s.*the {part} is empty|the {part} is empty"):
        format_completion(replace(SHOT, **{part: " "}))


def test_every_letter_of_a_prompt_is_in_its_hash():
    hashes = {
        p.hash
        for p in [
            ZERO_SHOT,
            Prompt("a"),
            Prompt("b"),
            Prompt("", (SHOT,)),
            Prompt("", (replace(SHOT, label="barn"),)),
            Prompt("", (SHOT, SHOT)),
            Prompt("", (replace(SHOT, input="x"),)),
        ]
    }
    assert len(hashes) == 7
    assert (
        Prompt("", (replace(SHOT, id="other"),)).hash == Prompt("", (SHOT,)).hash
    )  # the same text for the teacher


def test_few_shot_is_balanced_seeded_and_refuses_too_little():
    labels = TASKS["nli"].labels
    pool = [
        Example(
            str(i), "nli", f"Premise: {i}", labels[0] if i < 50 else labels[1 + i % 2], "because"
        )
        for i in range(60)
    ]
    prompt = few_shot("nli", pool, 9, seed=3)
    assert Counter(s.label for s in prompt.shots) == dict.fromkeys(labels, 3)
    assert few_shot("nli", pool, 9, seed=3) == prompt != few_shot("nli", pool, 9, seed=4)
    assert (
        len({few_shot("nli", pool, 3, seed=s).shots[-1].label for s in range(20)}) == 3
    )  # the last shot is no favourite
    with pytest.raises(UserError, match="only 59 examples"):
        few_shot("nli", [replace(pool[0], rationale="")] + pool[1:], 60)


# ---------------------------------------------------------------- parsing

CASES = [
    (" It swims.\nAnswer: pond\n\n", "stop", "ok", "It swims.", "pond"),
    (" It swims.\nAnswer: pond", "stop", "ok", "It swims.", "pond"),
    (" It swims.\nAnswer: pond", "length", "truncated", "It swims.", "pond"),
    (" It swims.\nAnswer: pond\nQuest", "length", "ok", "It swims.", "pond"),
    (" It swims.\nAnswer: pond\n\nQuestion", "length", "ok", "It swims.", "pond"),
    (" It swims and it", "length", "truncated", "It swims and it", ""),
    ("", "length", "truncated", "", ""),
    (" It swims.", "stop", "no_label", "It swims.", ""),
    (" It swims.\nAnswer:", "stop", "no_label", "It swims.", ""),
    (" It swims.\nAnswer: \nQuestion: x", "stop", "no_label", "It swims.", ""),
    ("", "stop", "no_rationale", "", ""),
    ("\n\n", "stop", "no_rationale", "", ""),
    (" \nAnswer: pond", "stop", "no_rationale", "", "pond"),
    ("Answer: pond", "stop", "no_rationale", "", "pond"),
    (" It swims.\nAnswer: the sea", "stop", "label_not_allowed", "It swims.", "the sea"),
    ("\nAnswer: the sea", "stop", "label_not_allowed", "", "the sea"),
    # the phrase twice: an aside, an invented next example, both inside a line
    (
        " Some say Answer: oven. It swims.\nAnswer: pond",
        "stop",
        "ok",
        "Some say Answer: oven. It swims.",
        "pond",
    ),
    (" It swims.\nAnswer: pond\nReasoning: no.\nAnswer: oven", "stop", "ok", "It swims.", "pond"),
    (
        " It swims.\nAnswer: pond\n\nQuestion: q\nReasoning: no.\nAnswer: oven",
        "stop",
        "ok",
        "It swims.",
        "pond",
    ),
    (
        " No oven, Answer: oven is wrong. Answer: pond",
        "stop",
        "ok",
        "No oven, Answer: oven is wrong.",
        "pond",
    ),
    # harmless differences
    (" It swims.\nAnswer: (b) Pond.", "stop", "ok", "It swims.", "pond"),
    (' It swims.\nAnswer: "pond"', "stop", "ok", "It swims.", "pond"),
    (" It\nswims\tfar.\nAnswer:  pond ", "stop", "ok", "It swims far.", "pond"),
    (
        " It swims.\nAnswer: pond, or maybe a barn",
        "stop",
        "label_not_allowed",
        "It swims.",
        "pond, or maybe a barn",
    ),
]


@pytest.mark.parametrize("text, finish, outcome, rationale, label", CASES)
def test_every_completion_has_an_outcome(text, finish, outcome, rationale, label):
    assert parse_for(question(0), text, finish) == Parsed(outcome, rationale, label)


@given(
    st.text(alphabet="ab :\nAnswer().pond", max_size=60),
    st.sampled_from(["stop", "length"]),
    st.booleans(),
)
def test_no_text_breaks_the_parser(text, finish, equation):
    p = parse_completion(
        text, finish, **({"metric": "equation"} if equation else {"labels": PLACES})
    )
    assert p.outcome in OUTCOMES and "\n" not in p.rationale + p.label
    if p.outcome == "ok":
        assert p.rationale and (equation or p.label in PLACES)


@pytest.mark.parametrize(
    "text, label",
    [
        ("( 3 + 4 )", "( 3 + 4 )"),
        ("3+4 = 7", "3+4"),
        ("( 8.0 - 3.0 ).", "( 8.0 - 3.0 )"),
        ("7", "7"),
        ("__import__('os').system('true')", None),
        ("3 / 0", None),
        ("three", "3"),
        ("one of the two", None),
        ("several", None),
        ("9**9**9", None),
        ("x = 3 + 4", "3 + 4"),
        ("= 7", "7"),
        ("$5 + $2 = $7", "7"),
        ("x = y", None),
        ("(" * 5000, None),
    ],
)
def test_equations_are_read_by_the_safe_parser(text, label):
    assert clean_label(text, metric="equation") == label


def test_labels_that_differ_in_case_only_are_not_guessed():
    assert (
        clean_label("Polish", ["polish", "Polish"]) is None
        and clean_label("polish", ["polish", "silver"]) == "polish"
    )
    assert (
        clean_label("a) pond", PLACES) == "pond"
        and clean_label("anything", None) == "anything"
        and clean_label("'.'", PLACES) is None
    )


# ---------------------------------------------------------------- extraction


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_mini_tokenizer(
        [format_prompt(question(1), [SHOT])] * 20, 560, tmp_path_factory.mktemp("tok")
    )


@pytest.fixture(scope="module")
def teacher(tok):
    return LocalBackend(
        mini_model("causal", "xs", len(tok), seed=0), tok, name="random", batch_size=4
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KD_NOTES_PROGRESS", "off")


class Wrapped:
    "A back end that can be told to fail after some completions, and notes what it is asked."

    def __init__(self, inner, stop_after=None, error=None):
        self.inner, self.stop_after, self.error, self.asked = inner, stop_after, error, []
        self.name, self.revision, self.describe = inner.name, inner.revision, inner.describe

    def generate(self, requests, decoding):
        self.asked += [name for name, _ in requests]
        for i, c in enumerate(self.inner.generate(requests, decoding)):
            if i == self.stop_after:
                raise self.error
            yield c


def untimed(rows):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


QUESTIONS = [question(i) for i in range(12)]


def test_rows_are_in_the_order_of_the_examples_and_the_manifest_says_who_was_asked_what(
    teacher, tmp_path
):
    rows = extract(
        QUESTIONS,
        teacher,
        rationale_decoding(10),
        tmp_path / "a.jsonl",
        prompt=Prompt("Go.", (SHOT,)),
    )
    assert [r["id"] for r in rows] == [q.id for q in QUESTIONS]
    assert {r["id"] for r in read_jsonl(tmp_path / "a.jsonl")} == {q.id for q in QUESTIONS}
    m = read_json(manifest_path(tmp_path / "a.jsonl"))
    assert (
        m["status"] == "done"
        and m["totals"]["rows"] == 12
        and m["prompt"]["shots"] == ["s"]
        and m["prompt"]["header"] == "Go."
    )
    assert m["backend"] == teacher.describe() and m["decoding"]["max_new_tokens"] == 10
    assert m["totals"]["completion_tokens"] == sum(r["completion_tokens"] for r in rows) <= 120
    assert sum(m["totals"]["outcomes"].values()) == 12 and m["sessions"][0]["rows"] == 12
    assert all(
        {
            "id",
            "text",
            "outcome",
            "rationale",
            "label",
            "completion_tokens",
            "seconds",
            "prompt_hash",
        }
        <= r.keys()
        for r in rows
    )


def test_a_finished_extraction_asks_nothing_and_a_longer_list_asks_the_rest(teacher, tmp_path):
    first = extract(QUESTIONS[:7], teacher, rationale_decoding(6), tmp_path / "a.jsonl")
    idle = Wrapped(teacher)
    assert (
        extract(QUESTIONS[:7], idle, rationale_decoding(6), tmp_path / "a.jsonl") == first
        and idle.asked == []
    )
    more = Wrapped(teacher)
    rows = extract(QUESTIONS, more, rationale_decoding(6), tmp_path / "a.jsonl")
    assert sorted(more.asked) == sorted(q.id for q in QUESTIONS[7:]) and rows[:7] == first
    assert extract(QUESTIONS[3:5], idle, rationale_decoding(6), tmp_path / "a.jsonl") == rows[3:5]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("the server is down")])
def test_an_interruption_keeps_what_was_there_and_goes_on(teacher, tmp_path, error):
    whole = extract(QUESTIONS, teacher, rationale_decoding(8), tmp_path / "whole.jsonl")
    with pytest.raises(type(error)):
        extract(QUESTIONS, Wrapped(teacher, 5, error), rationale_decoding(8), tmp_path / "a.jsonl")
    m = read_json(manifest_path(tmp_path / "a.jsonl"))
    assert (m["status"], m["totals"]["rows"], len(read_jsonl(tmp_path / "a.jsonl"))) == (
        "interrupted",
        5,
        5,
    )
    rest = Wrapped(teacher)
    assert untimed(
        extract(QUESTIONS, rest, rationale_decoding(8), tmp_path / "a.jsonl")
    ) == untimed(whole)
    assert len(rest.asked) == 7 and len(read_jsonl(tmp_path / "a.jsonl")) == 12
    m = read_json(manifest_path(tmp_path / "a.jsonl"))
    assert (m["status"], m["totals"]["rows"], [s["rows"] for s in m["sessions"]]) == (
        "done",
        12,
        [5, 7],
    )


PROGRAM = """
    import sys, time
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[3])
    from test_rationales import QUESTIONS_60, DECODING
    from kd_notes.generation.backends import open_backend
    from kd_notes.methods.rationales import extract

    class Slow:
        "The real back end, with a pause after each completion, so that a kill finds it at work."
        def __init__(self, inner):
            self.inner, self.describe = inner, inner.describe

        def generate(self, requests, decoding):
            for c in self.inner.generate(requests, decoding):
                yield c
                time.sleep(0.02)

    extract(QUESTIONS_60, Slow(open_backend(sys.argv[1], batch_size=8)), DECODING, sys.argv[2])
"""
QUESTIONS_60 = [question(i) for i in range(60)]
DECODING = Decoding(12, temperature=0.9, n=2, seed=1, stop=(END,))


def start(program, *args, **kwargs):
    here = os.path.dirname(__file__)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args), here],
        text=True,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def wait_for_rows(path, count, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    raise AssertionError("too slow")


@pytest.fixture(scope="module")
def folder(teacher, tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    teacher.model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def test_killed_three_times_and_nothing_is_lost_or_repeated(folder, tmp_path):
    out = tmp_path / "killed.jsonl"
    seen = []
    for count in (7, 31, 80):
        process = start(PROGRAM, folder, out)
        wait_for_rows(out, count, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        complete = out.read_bytes().rpartition(b"\n")[0].splitlines()
        seen.append(len(complete))
        assert [json.loads(line) for line in complete]  # each of them whole
        with open(
            out, "ab"
        ) as f:  # the kill could have come in the middle of a line; make sure that one does
            f.write(b'{"id": "q3", "text": "\xc3')
    assert seen[0] < seen[1] < seen[2] < 120
    assert read_json(manifest_path(out))["status"] == "running"
    assert start(PROGRAM, folder, out).wait() == 0
    from kd_notes.generation.backends import open_backend

    whole = extract(
        QUESTIONS_60, open_backend(folder, batch_size=8), DECODING, tmp_path / "whole.jsonl"
    )
    rows = read_jsonl(out)
    assert Counter((r["id"], r.get("sample", 0)) for r in rows) == Counter(
        (q.id, k) for q in QUESTIONS_60 for k in range(2)
    )
    done = read_json(manifest_path(out))
    write_json(
        manifest_path(out), done | {"status": "running", "totals": None}
    )  # killed after the last row, before the manifest said so
    again = extract(QUESTIONS_60, open_backend(folder, batch_size=8), DECODING, out)
    assert untimed(again) == untimed(whole) and len(read_jsonl(out)) == 120
    assert {k: read_json(manifest_path(out))[k] for k in ("status", "totals")} == {
        k: done[k] for k in ("status", "totals")
    }


def test_ctrl_c_leaves_a_file_that_goes_on(folder, tmp_path):
    out = tmp_path / "a.jsonl"
    process = start(PROGRAM, folder, out)
    wait_for_rows(out, 5, process)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    m, rows = read_json(manifest_path(out)), read_jsonl(out)
    assert m["status"] == "interrupted" and m["totals"]["rows"] == len(rows)
    assert 4 <= len(rows) < 120  # the row that was being written is taken back


def test_a_second_process_is_kept_out(folder, teacher, tmp_path):
    out = tmp_path / "a.jsonl"
    process = start(PROGRAM, folder, out)
    wait_for_rows(out, 2, process)
    try:
        with pytest.raises(UserError, match="another process"):
            extract(QUESTIONS_60, teacher, DECODING, out)
    finally:
        process.kill()
        process.wait()


def test_a_full_disk_is_one_paragraph_and_loses_nothing(folder, tmp_path):
    "A limit on the size of files, set in the child, stands in for the end of the disk: the kernel refuses the write."
    out = tmp_path / "a.jsonl"
    program = (
        PROGRAM.replace(
            "    extract(",
            """
    from kd_notes.core import UserError
    try:
        extract(""",
        ).rstrip()
        + """
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    """
    )
    process = start(
        program,
        folder,
        out,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)),
    )
    message = process.communicate(timeout=120)[1]
    assert (
        process.returncode == 2
        and "a.jsonl" in message
        and "space" in message
        and "Traceback" not in message
    )
    kept = read_jsonl(out)  # whole rows only
    assert 5 < len(kept) < 120 and out.stat().st_size <= 6000
    assert start(PROGRAM, folder, out).wait() == 0
    assert len(read_jsonl(out)) == 120 and read_jsonl(out)[: len(kept)] == kept


def test_an_extraction_is_not_continued_as_another_one(teacher, tok, tmp_path):
    path, decoding = tmp_path / "a.jsonl", rationale_decoding(6)
    extract(QUESTIONS, teacher, decoding, path)
    before = path.read_bytes(), manifest_path(path).read_bytes()
    other = LocalBackend(mini_model("causal", "xs", len(tok), seed=1), tok, name="random")
    for match, call in {
        "decoding.max_new_tokens: 6 -> 7": lambda: extract(
            QUESTIONS, teacher, rationale_decoding(7), path
        ),
        "decoding.temperature": lambda: extract(
            QUESTIONS, teacher, rationale_decoding(6, temperature=1.0), path
        ),
        "prompt.hash": lambda: extract(
            QUESTIONS, teacher, decoding, path, prompt=Prompt("", (SHOT,))
        ),
        "backend.revision": lambda: extract(QUESTIONS, other, decoding, path),
        "backend.kind: 'local' -> 'replay'": lambda: extract(
            QUESTIONS, ReplayBackend(path), decoding, path
        ),
        "task": lambda: extract(
            [replace(q, task="svamp") for q in QUESTIONS], teacher, decoding, path
        ),
        "a.jsonl:.*'q3' has changed": lambda: extract(
            [replace(q, input=q.input + "!") if q.id == "q3" else q for q in QUESTIONS],
            teacher,
            decoding,
            path,
        ),
    }.items():
        with pytest.raises(UserError, match=match):
            call()
        assert (path.read_bytes(), manifest_path(path).read_bytes()) == before
    manifest_path(path).unlink()
    with pytest.raises(UserError, match="no manifest"):
        extract(QUESTIONS, teacher, decoding, path)


def test_duplicate_ids_no_examples_and_shots_that_give_the_answer_away_are_refused(
    teacher, tmp_path
):
    path, decoding = tmp_path / "a.jsonl", rationale_decoding(4)
    with pytest.raises(UserError, match="1 ids occur more than once, among them 'q2'"):
        extract([*QUESTIONS, question(2)], teacher, decoding, path)
    with pytest.raises(UserError, match="no examples"):
        extract([], teacher, decoding, path)
    with pytest.raises(UserError, match="shows the solution.*'q1'"):
        extract(
            QUESTIONS,
            teacher,
            decoding,
            path,
            prompt=Prompt("", (replace(SHOT, input=question(1).input),)),
        )
    assert not path.exists() and not manifest_path(path).exists()


def test_a_damaged_row_is_named(teacher, tmp_path):
    path = tmp_path / "a.jsonl"
    extract(QUESTIONS, teacher, rationale_decoding(4), path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]) + "\n")
    with pytest.raises(UserError, match="a.jsonl:4"):
        extract(QUESTIONS, teacher, rationale_decoding(4), path)


def test_replay_stands_in_for_the_teacher(teacher, tmp_path):
    decoding = rationale_decoding(8)
    rows = extract(QUESTIONS, teacher, decoding, tmp_path / "a.jsonl")
    replayed = extract(
        QUESTIONS[2:9], ReplayBackend(tmp_path / "a.jsonl"), decoding, tmp_path / "b.jsonl"
    )
    assert compare_rows(rows, replayed) == {
        "n": 7,
        "same_text": 1.0,
        "same_label": 1.0,
        "different": [],
    }
    changed = [replayed[0] | {"text": "x", "label": "y"}, *replayed[1:]]
    assert compare_rows(rows, changed) == {
        "n": 7,
        "same_text": 6 / 7,
        "same_label": 6 / 7,
        "different": ["q2"],
    }
    with pytest.raises(UserError, match="no id in common"):
        compare_rows(rows[:2], replayed)


# ---------------------------------------------------------------- joining


def row(ex, label="", rationale="Because it is so.", outcome="ok", **more):
    return {
        "id": ex.id,
        "rationale": rationale,
        "label": label or ex.label,
        "outcome": outcome,
        "text": "",
        "completion_tokens": 5,
        **more,
    }


def test_rows_are_joined_by_id_never_by_place():
    rows = [row(q, rationale=f"reason for {q.id}", label="pond") for q in QUESTIONS]
    joined = with_rationales(QUESTIONS, rows[::-1], labels="teacher")
    assert all(e.rationale == f"reason for {e.id}" and e.label == "pond" for e in joined)
    assert [e.label for e in with_rationales(QUESTIONS, rows)] == [q.label for q in QUESTIONS]


def test_what_is_not_ok_is_left_out_unless_it_is_asked_for():
    rows = [row(q, outcome=OUTCOMES[i % 5]) for i, q in enumerate(QUESTIONS)]
    assert [e.id for e in with_rationales(QUESTIONS, rows)] == ["q0", "q5", "q10"]
    assert len(with_rationales(QUESTIONS, rows, keep=("ok", "truncated"))) == 5
    with pytest.raises(UserError, match="'q11' has no row"):
        with_rationales(QUESTIONS, rows[:11])
    with pytest.raises(UserError, match="'q0' has 2 rows.*vote"):
        with_rationales(QUESTIONS, rows + rows[:1])
    with pytest.raises(UserError, match="labels"):
        with_rationales(QUESTIONS, rows, labels="llm")


# ---------------------------------------------------------------- votes, filters, report


def test_the_majority_wins_and_ties_go_to_the_first_sample():
    q = question(0)

    def won(*labels):
        rows = [
            row(
                q,
                label=x,
                rationale=f"r{k}",
                sample=k,
                outcome="ok" if x in PLACES else "label_not_allowed",
            )
            for k, x in enumerate(labels)
        ]
        (found,) = vote(rows[::-1], "cqa")
        return found["label"], found["rationale"], found["agreement"]

    assert won("oven", "pond", "pond") == ("pond", "r1", 2 / 3)
    assert won("oven", "pond", "pond", "oven") == ("oven", "r0", 0.5)
    assert won("sea", "sea", "sea", "barn") == ("barn", "r3", 0.25)
    assert won("sea", "lake") == ("sea", "r0", 0.0)


@given(
    st.lists(st.sampled_from(["( 3 + 4 )", "4 + 3", "7", "8 - 2", "2 * 3"]), min_size=1, max_size=9)
)
def test_equations_vote_by_value(labels):
    q = Example("p", "svamp", "Question: 3 and 4?", "( 3 + 4 )")
    (won,) = vote([row(q, label=x, sample=k) for k, x in enumerate(labels)], "svamp")
    sevens = sum(x in ("( 3 + 4 )", "4 + 3", "7") for x in labels)
    assert won["votes"] == max(sevens, len(labels) - sevens)
    assert "sample" not in won and won["agreement"] == won["votes"] / len(labels)


def test_a_filter_reports_its_yield_and_what_it_has_done():
    labels = TASKS["nli"].labels
    pool = [Example(str(i), "nli", "word " * (5 + i % 3), labels[i % 3], "") for i in range(90)]
    rows = [
        row(
            ex,
            label="neutral" if ex.label != "entailment" else "entailment",
            rationale="w " * (2 if i % 3 else 6),
            agreement=0.2 if i < 9 else 0.9,
        )
        for i, ex in enumerate(pool)
    ]
    rows[-1] |= {"outcome": "truncated"}
    kept, report = select(pool, rows, check=lambda ex, r: ex.id != "10", min_agreement=0.5)
    assert report["dropped"] == {
        "wrong label": 29,
        "low agreement": 6,
        "truncated": 1,
        "check failed": 1,
    }
    assert len(kept) == 53 and report["yield"] == 53 / 90
    share = report["after"]["kinds"]
    assert share == {"entailment": round(27 / 53, 4), "neutral": round(26 / 53, 4)}
    assert report["shift"] == pytest.approx(1 / 3, abs=1e-3)  # contradiction is gone
    assert report["before"]["rationale_words"] < report["after"]["rationale_words"]
    assert select(pool, rows, gold=False)[1]["dropped"] == {"truncated": 1}
    with pytest.raises(UserError, match="no gold label"):
        select([replace(ex, label="") for ex in pool], rows)
    with pytest.raises(UserError, match="belong to no example.*'0'"):
        select(pool[1:], rows)


def test_kinds_of_tasks_with_open_labels():
    assert filters_module.kind_of(question(2)) == "choice 3"
    assert filters_module.kind_of(Example("p", "svamp", "x", "( 3 + 4 ) * 2")) == "+*"


def test_templates_survive_a_change_of_the_words_they_are_filled_with():
    def ex(thing, place, n):
        return Example(
            "x", "cqa", f"Question: {n} people look for a {thing}. Choices: {place}, moon", place
        )

    text = "A {} is used for work. Such things are kept in a {}. So {} people go there."
    made = {
        filters_module.template_of(ex(*w), text.format(*w))
        for w in [("hammer", "shed", 3), ("needle box", "drawer", 14), ("lamps", "attic", 2)]
    }
    assert len(made) == 1
    assert (
        filters_module.template_of(
            ex("hammer", "shed", 3), "Hammers are tools, so look in the shed."
        )
        not in made
    )


def test_the_report_counts_what_it_says():
    register_task(TaskInfo("test-report", "t", labels=("yes", "no")))
    pool = [
        Example(
            str(i),
            "test-report",
            f"Is item{i} heavy?",
            "yes" if i % 2 else "no",
            f"The item{i} is made of stone.",
        )
        for i in range(10)
    ]
    rows = [
        row(ex, label="yes", rationale=ex.rationale if i < 5 else f"number {i} says so")
        for i, ex in enumerate(pool)
    ]
    rows[9] |= {"outcome": "truncated", "rationale": "", "label": ""}
    got = rationale_report(
        pool,
        rows,
        oracle=lambda ex, r: "stone" in r,
        shown=[
            replace(
                pool[0], id="s", input="Is item77 heavy?", rationale="The item77 is made of stone."
            )
        ],
    )
    assert (
        got["label_accuracy"] == 4 / 10
        and got["label_accuracy_ok"] == 4 / 9
        and got["validity_ok"] == 5 / 9
    )
    assert got["validity_right_label"] == 2 / 4 and got["validity_wrong_label"] == 3 / 5
    assert (
        got["template_copies_ok"] == 5 / 9
        and got["different_ok"] == 1.0
        and got["different_templates_ok"] == 2 / 9
    )
    assert got["outcomes"]["truncated"] == 1 and got["words_ok"]["p50"] in (4, 6) and got["n"] == 10
    bare = rationale_report([replace(ex, label="") for ex in pool], rows)
    assert bare["label_accuracy"] is bare["validity_ok"] is bare["template_copies_ok"] is None
    TASKS.pop("test-report")


def test_the_manifest_and_rows_of_an_unfinished_write_are_repaired_on_disk(teacher, tmp_path):
    path = tmp_path / "a.jsonl"
    extract(QUESTIONS[:4], teacher, rationale_decoding(4), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # a whole row without its newline is kept
    idle = Wrapped(teacher)
    extract(QUESTIONS[:4], idle, rationale_decoding(4), path)
    assert path.read_bytes() == whole and idle.asked == []
    append_jsonl(path, [])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "written, value",
    [("1,234", "1234"), ("$42", "42"), ("42 dollars", "42"), ("72, in total", "72")]
    + [
        ("$1,234.50", "1234.50"),
        ("1.234,5", "1234.5"),
        ("1 234", "1234"),
        ("1/2", "1/2"),
        ("50%", "50"),
    ]
    + [("1e3", "1000"), ("−5", "-5"), ("１２３", "123"), ("5 million", "5000000"), ("x = 72", "72")]
    + [("8 × 9 = 72", "8 * 9"), ("$\\boxed{72}$", "72"), ("42.", "42"), ("#### 42", "42")],
)
def test_numbers_in_a_teachers_form_are_its_label(written, value):
    parsed = parse_completion(f"They add up.\nAnswer: {written}", metric="equation")
    assert (parsed.outcome, parsed.label) == ("ok", value)
    assert (
        parse_completion("So.\nAnswer: 3 cats, 4 dogs", metric="equation").outcome
        == "label_not_allowed"
    )


class Mortal:
    "A back end that writes a fixed answer to each prompt, and whose process may be killed at any answer."

    name = revision = "mortal"

    def __init__(self, answers_to_live=None, path=None):
        self.answers_to_live = answers_to_live
        self.path = path

    def describe(self):
        return {"kind": "mortal"}

    def generate(self, requests, decoding):
        for number, (name, prompt) in enumerate(requests):
            if number == self.answers_to_live:
                if number % 2:  # the kill comes in the middle of a line, and of a letter
                    with open(self.path, "ab") as f:
                        f.write(b'{"id": "q3", "text": "\xc3')
                os.kill(os.getpid(), signal.SIGKILL)
            yield Completion(name, f"Because {name}.\nAnswer: pond", len(prompt), 5, "stop", 0.5)


def test_forty_kills_leave_the_very_same_file(tmp_path):
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    questions = [question(i) for i in range(90)]
    extract(questions, Mortal(), rationale_decoding(32), whole)
    for kill in range(40):
        child = os.fork()
        if child == 0:
            try:
                extract(questions, Mortal(kill % 4, killed), rationale_decoding(32), killed)
            finally:
                os._exit(1)  # not reached: the back end kills its process
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert 0 < killed.read_bytes().count(b"\n") < 90
    extract(questions, Mortal(), rationale_decoding(32), killed)
    assert killed.read_bytes() == whole.read_bytes()
    ours, theirs = (read_json(manifest_path(path)) for path in (killed, whole))
    assert ours["totals"] == theirs["totals"] and ours["status"] == "done"


@pytest.mark.parametrize(
    "line",
    ["**Answer:** pond", "**Answer: pond**", "Final Answer: pond", "Final answer: pond"]
    + ["answer: pond", "### Answer: pond", "### Final answer:\npond", "- Answer: pond"]
    + [
        "\n**Answer:** pond",
        "\n\nFinal answer: pond",
        "The final answer is: **pond**.",
        "---\nAnswer: pond",
    ]
    + [
        "> Answer: pond",
        "__Answer__: pond",
        "**Answer**: (b) pond",
        "Answer: $\\boxed{\\text{pond}}$",
    ]
    + [
        "## Answer\npond",
        "### Final Answer\n**pond**",
        "**Final Answer:**\n\npond",
        "Answer:\npond",
    ]
    + [
        "1. Answer: pond",
        "Answer = pond",
        "Answer： pond",
        "<answer>pond</answer>",
        "\\boxed{pond}",
    ]
    + ["Answer: <answer>pond</answer>", "```\nAnswer: pond\n```", "Answer: pond</s>", "#### pond"]
    + [
        "Answer: pond<|im_end|>",
        "Answer: “pond”",
        "Answer: « pond »",
        "Answer: pond (there is water)",
    ]
    + ["Answer: pond, because of the fish.", "The answer is pond.", "So the answer is: pond"]
    + ["Therefore, the answer is **pond**.", "Answer: The answer is pond"],
)
def test_markdown_around_the_answer_is_no_part_of_rationale_or_label(line):
    for rationale in (
        "Herons eat fish.",
        "**Reasoning:** Herons eat fish.",
        "### Reasoning:\nHerons eat fish.",
    ):
        parsed = parse_completion(f" {rationale}\n{line}", labels=PLACES)
        assert parsed == Parsed("ok", "Herons eat fish.", "pond")


@pytest.mark.parametrize(
    "answer", ["pond or attic", "not pond", "pond, or perhaps the attic", "either pond", "ponds"]
)
def test_an_answer_that_names_more_than_a_label_is_not_guessed(answer):
    parsed = parse_completion(f"Herons eat fish.\nAnswer: {answer}", labels=PLACES)
    assert parsed.outcome == "label_not_allowed"


def test_an_answer_with_no_word_behind_it_is_not_taken_from_the_next_example():
    text = " Herons eat fish.\nAnswer:\nQuestion: Where is a lamp?\nReasoning: Old.\nAnswer: attic"
    assert parse_completion(text, labels=PLACES).outcome == "no_label"
    text = " Herons eat fish.\n\nQuestion: Where is a lamp?\nReasoning: Old.\nAnswer: attic"
    assert parse_completion(text, labels=PLACES).outcome == "no_label"


@pytest.mark.parametrize(
    "line",
    ["Answer: pond - there is water", "Answer: 2. pond", "Answer: [pond]", "Answer: {pond}", "Answer: It is pond."]
    + ["Answer: The label is pond.", "Answer - pond", "Answer is pond", "Thus the label is pond.", "Answer:\n\npond"]
    + ["Answer: pond\u200b", "Answer: ｐｏｎｄ", "Answer: pond ✅", "✅ Answer: pond", "Answer: 🟡 pond"]
    + ["Answer: <b>pond</b>", "<b>Answer:</b> pond", "\\textbf{Answer:} pond", "\nAnswer: pond", "\n\n**Answer**\n\npond"],
)  # fmt: skip
def test_an_answer_in_other_dress_is_that_answer(line):
    parsed = parse_completion(f"Herons eat fish.\n{line}", labels=PLACES)
    assert parsed == Parsed("ok", "Herons eat fish.", "pond")


@pytest.mark.parametrize(
    "written, label",
    [
        ("(B)", "B"), ("B)", "B"), ("b.", "B"), ("**B**", "B"), ("\\boxed{B}", "B"), ("The answer is (B).", "B"),
        ("B: because it swims", "B"), ("Option B", None), ("B or C", None), ("D", None), ("A, not B", None),
    ],
)  # fmt: skip
def test_letters_as_labels(written, label):
    assert clean_label(written, ["A", "B", "C"]) == label


@pytest.mark.parametrize(
    "labels",
    [
        ("C", "C++", "C#"), ("entailment", "not entailment"), ("positive", "very positive"), ("1", "2", "10"),
        ("*", "**"), ("a, b", "a"), ("e\u0301t\u00e9", "hiver"), ("-1", "1"), ("1.0", "1"), ("I", "II", "III"),
        ("(a)", "(b)"), ("yes.", "no."), ("because", "since"), ("😀", "😡"), ("Ja", "Nein"), ("$", "€"), ("N/A", "n"),
    ],
)  # fmt: skip
def test_every_label_can_be_met(labels):
    assert [clean_label(label, labels) for label in labels] == list(labels)


def test_a_label_is_met_in_another_normal_form():
    assert clean_label("\u00e9t\u00e9", ["e\u0301te\u0301", "hiver"]) == "e\u0301te\u0301"


def test_blank_lines_inside_an_answer_do_not_end_it_but_the_next_example_does():
    text = "**Premise.** Herons.\n\nThey eat fish.\n\n**Answer:** pond\n\nIs there more?"
    assert parse_completion(text, labels=PLACES).label == "pond"
    assert parse_completion(text, labels=PLACES).rationale == "**Premise.** Herons. They eat fish."
    cut = parse_completion("Herons eat fish.\n\nAnd they", "length", labels=PLACES)
    assert cut.outcome == "truncated"


def test_a_value_that_does_not_exist_is_no_answer():
    assert parse_completion("So.\nAnswer: 12/0", metric="equation").outcome == "label_not_allowed"


def test_control_tokens_are_no_part_of_a_rationale():
    text = "<|begin_of_solution|>Herons eat fish.\nAnswer: pond<|end_of_solution|>"
    assert parse_completion(text, labels=PLACES) == Parsed("ok", "Herons eat fish.", "pond")


def test_the_label_of_a_completion_that_was_cut_is_not_counted_as_right():
    examples = [Example(f"e{i}", "nli", "Premise: a.", "neutral", "") for i in range(4)]
    outcomes = ("ok", "no_rationale", "truncated", "label_not_allowed")
    rows = [
        {"id": example.id, "outcome": outcome, "label": "neutral"}
        for example, outcome in zip(examples, outcomes)
    ]
    assert _score(task_info("nli"), examples, rows)["accuracy"] == 0.5


@pytest.mark.parametrize(
    "text, label",
    [
        ("We add.\nAnswer: 8\nWait, one is missing.\nFinal answer: 7", "7"),
        ("We add.\nAnswer: 8\nWait. **Final answer:** 7", "7"),
        ("Answer: 8. No. The final answer is: 7", "7"),
        ("We add.\nFinal answer: 8\nNo.\n### Final Answer\n7", "7"),
        ("We add.\nFinal answer: 7\nQuestion: What now?\nAnswer: 8", "7"),
        ("We add.\nAnswer: 7\nQuestion: What now?\nAnswer: 8", "7"),
        ("We add.\nAnswer: 4 weeks = 28 days", None),
        ("We add.\nAnswer: x = 5 or x = 7", None),
        ("We add.\nAnswer: 5 dozen = 60", "5 * 12"),
        ("We add.\nAnswer: 3 + 4 = 7", "3 + 4"),
        ("We add.\nAnswer: x = 3 + 4 = 7", "7"),
    ],
)
def test_the_answer_that_a_teacher_ends_with_counts(text, label):
    parsed = parse_completion(text, metric="equation")
    assert (parsed.outcome == "ok") is (label is not None)
    assert label is None or equation_value(parsed.label) == equation_value(label)
