"""kd_notes.data: the schema and its errors, splits, near-duplicates, probes, and real sets from a folder and from the hub's layout."""

import json
import os
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kd_notes.data.examples as examples_module
import kd_notes.data.adapters as adapters_module
import kd_notes.data.public as public_module
import kd_notes.data.quality as quality_module
from kd_notes.core import append_jsonl, rng, UserError
from kd_notes.data.examples import Example, load_jsonl, load_split, TaskInfo, write_split
from kd_notes.data.public import load_real
from kd_notes.data.quality import near_duplicates, surface_probes
from kd_notes.data.answers import equation_value

FIXTURES = Path(__file__).parent / "fixtures" / "real"
REAL = os.environ.get("KD_NOTES_DATA")
needs_real = pytest.mark.real_data
words = st.text(alphabet="abcde ,.", max_size=40)
printable = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=20
).filter(str.strip)


def problem(i, label=None, text="How many?"):
    return Example(f"p{i}", "svamp", f"Question: {text}", label or f"{i} + 1")


# --- the schema --------------------------------------------------------------------------------------------------------------


def test_example_is_frozen_and_hashable():
    ex = Example("a", "cqa", "Where?", "b", choices=("a", "b"), meta={"hops": 2})
    with pytest.raises(FrozenInstanceError):
        ex.label = "a"
    assert (
        len({ex, replace(ex, meta={"hops": 3}), replace(ex, label="a")}) == 3
    )  # equality sees meta, the hash does not


@given(
    st.builds(
        Example,
        id=printable,
        task=st.just("toy"),
        input=printable,
        label=printable,
        rationale=printable,
        choices=st.lists(printable, max_size=3).map(tuple),
        meta=st.dictionaries(printable, st.integers(), max_size=2),
    )
)
def test_row_round_trip(ex):
    assert examples_module.example_from_row(json.loads(json.dumps(ex.to_dict())), "toy") == ex


def test_unknown_task_names_the_known_ones():
    with pytest.raises(UserError, match="known are anli, cqa, gsm8k, nli, svamp"):
        examples_module.task_info("mnli")


def test_registered_task_is_found_and_bad_metric_refused():
    info = TaskInfo("colours", "Colours", labels=("red", "blue"))
    try:
        assert examples_module.task_info(examples_module.register_task(info).name) is info
        with pytest.raises(UserError, match="'exact' or 'equation'"):
            examples_module.register_task(TaskInfo("x", "x", metric="bleu"))
    finally:
        del examples_module.TASKS["colours"]


@pytest.mark.parametrize(
    "task, text, parts",
    [
        (
            "nli",
            examples_module.nli_input("The Hypothesis: is odd.", "Yes\n it  is."),
            ("Premise: The Hypothesis: is odd.", "Yes it is."),
        ),
        (
            "cqa",
            examples_module.choice_input("Where?", ["a", "b c"]),
            ("Question: Where?", "a, b c"),
        ),
        ("svamp", examples_module.problem_input("2 and\t2?"), ("", "Question: 2 and 2?")),
    ],
)
def test_inputs_are_joined_and_split_at_the_last_mark(task, text, parts):
    assert examples_module.split_input(task, text) == parts


# --- JSONL of your own -------------------------------------------------------------------------------------------------------

GOOD = {"id": "1", "input": "x", "label": "neutral"}


@pytest.mark.parametrize(
    "row, task, message",
    [
        ("{not json", "nli", r":2: the row is not one JSON object"),
        ([1, 2], "nli", r":2: the row is not one JSON object"),
        ({"input": "x", "label": "neutral"}, "nli", r":2: the field 'id' is missing"),
        ({"id": "2", "label": "neutral"}, "nli", r":2: the field 'input' is missing"),
        (
            {"id": "2", "input": "  ", "label": "neutral"},
            "nli",
            r":2: the field 'input' is missing or empty",
        ),
        (
            {"id": 2, "input": "x", "label": "neutral"},
            "nli",
            r":2: the field 'id' should be text, not a number \(2\)",
        ),
        (
            {"id": "2", "input": "x", "label": None},
            "nli",
            r":2: the label is empty",
        ),
        (
            {"id": "2", "input": "x", "label": "neutral", "rational": "y"},
            "nli",
            r":2: the field 'rational' is not known",
        ),
        (
            {"id": "2", "input": "x", "label": "neutral", "meta": []},
            "nli",
            r":2: the field 'meta' should be an object, not a list",
        ),
        (
            {"id": "2", "input": "x", "label": "neutral", "task": "cqa"},
            "nli",
            r":2: the row belongs to the task 'cqa', not 'nli'",
        ),
        (
            {"id": "2", "input": "x", "label": "Neutral"},
            "nli",
            r":2: the label 'Neutral' is not one of entailment, neutral, contradiction",
        ),
        ({"id": "2", "input": "x"}, "nli", r":2: the label is empty"),
        (
            {"id": "1", "input": "x", "label": "neutral"},
            "nli",
            r":2: the id '1' was already used at .*:1",
        ),
        (
            {"id": "2", "input": "x", "label": "a", "choices": ["b", "c"]},
            "cqa",
            r":2: the label 'a' is not among the choices",
        ),
        (
            {"id": "2", "input": "x", "label": "a", "choices": ["a", 3]},
            "cqa",
            r":2: the choices should all be text",
        ),
        (
            {"id": "2", "input": "x", "label": "( 3 + "},
            "svamp",
            r":2: the label '\( 3 \+ ' is not an equation",
        ),
        (
            {"id": "2", "input": "x", "label": "3 / ( 2 - 2 )"},
            "svamp",
            r":2: .* is not an equation with a value",
        ),
        (
            {"id": "2", "input": "x", "label": "__import__('os')"},
            "svamp",
            r":2: .* is not an equation",
        ),
    ],
)
def test_bad_row_is_named(tmp_path, row, task, message):
    first = {"nli": GOOD, "cqa": {**GOOD, "choices": ["neutral"]}, "svamp": {**GOOD, "label": "1"}}[
        task
    ]
    path = tmp_path / "own.jsonl"
    path.write_text(
        json.dumps(first) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n"
    )
    with pytest.raises(UserError, match=message) as e:
        load_jsonl(path, task)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_null_in_a_column_of_other_tasks_is_absent(tmp_path):
    row = {"id": "1", "input": "x", "label": "neutral"}
    nulls = {"rationale": None, "choices": None, "meta": None, "task": None, "premise": None}
    (tmp_path / "own.jsonl").write_text(json.dumps(row | nulls) + "\n")
    (made,) = load_jsonl(tmp_path / "own.jsonl", "nli")
    assert made == Example(**row, task="nli")


def test_blank_lines_count_in_the_line_number(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(
        "\n" + json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "label": "maybe"}) + "\n"
    )
    with pytest.raises(UserError, match=r":4: the label 'maybe'"):
        load_jsonl(path, "nli")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "own.jsonl").write_text(content)
    with pytest.raises(UserError, match="no rows"):
        load_jsonl(tmp_path / "own.jsonl", "nli")


def test_own_labels_and_unlabelled_rows(tmp_path):
    append_jsonl(
        tmp_path / "own.jsonl",
        [{"id": "1", "input": "x", "label": "spam"}, {"id": "2", "input": "y", "label": ""}],
    )
    with pytest.raises(UserError, match=":2: the label is empty"):
        load_jsonl(tmp_path / "own.jsonl", "mail", labels=["spam", "ham"])
    assert [
        ex.label
        for ex in load_jsonl(tmp_path / "own.jsonl", "mail", labels=["spam", "ham"], labelled=False)
    ] == ["spam", ""]
    with pytest.raises(UserError, match=":1: the label 'spam' is not one of"):
        load_jsonl(tmp_path / "own.jsonl", "mail", labels=["ham"], labelled=False)


# --- splits ------------------------------------------------------------------------------------------------------------------


def test_split_round_trip_and_withheld_labels(tmp_path):
    rows = [replace(problem(i), rationale="because", meta={"kind": "add"}) for i in range(5)]
    for split in ("test", "unlabelled"):
        write_split("svamp", split, rows, root=tmp_path)
    assert (
        load_split("svamp", "test", root=tmp_path)
        == rows
        == load_split("svamp", "unlabelled", gold=True, root=tmp_path)
    )
    for ex, row in zip(load_split("svamp", "unlabelled", root=tmp_path), rows):
        assert ex == Example(row.id, "svamp", row.input)  # nothing but the input is left


def test_writing_twice_gives_the_same_bytes(tmp_path):
    path = write_split("svamp", "pool", [problem(i) for i in range(9)], root=tmp_path)
    before = path.read_bytes(), examples_module.split_checksum("svamp", "pool", root=tmp_path)
    write_split("svamp", "pool", load_split("svamp", "pool", root=tmp_path), root=tmp_path)
    assert (
        path.read_bytes(),
        examples_module.split_checksum("svamp", "pool", root=tmp_path),
    ) == before


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "the split is empty"),
        ([problem(1), problem(1)], "'p1' was already used at svamp/pool, example 0"),
        ([problem(1), problem(2, "one")], "svamp/pool, example 1: the label 'one'"),
        ([replace(problem(1), task="cqa")], "belongs to the task 'cqa'"),
    ],
)
def test_write_split_refuses_and_leaves_the_old_file(tmp_path, rows, message):
    path = write_split("svamp", "pool", [problem(7)], root=tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        write_split("svamp", "pool", rows, root=tmp_path)
    assert path.read_bytes() == before and load_split("svamp", "pool", root=tmp_path) == [
        problem(7)
    ]


def test_changed_missing_and_unrecorded_files(tmp_path):
    path = write_split("svamp", "pool", [problem(7)], root=tmp_path)
    load_split("svamp", "pool", root=tmp_path)  # verified once in this process ...
    path.write_text(path.read_text().replace("7 + 1", "7 + 2"))
    with pytest.raises(UserError, match="differs from its recorded checksum"):
        load_split("svamp", "pool", root=tmp_path)  # ... and again, since the file has changed
    with pytest.raises(UserError, match="the split is missing"):
        load_split("svamp", "test", root=tmp_path)
    (tmp_path / "svamp" / "test.jsonl").write_text(path.read_text())
    with pytest.raises(UserError, match="no checksum is recorded for test.jsonl"):
        load_split("svamp", "test", root=tmp_path)
    (tmp_path / "svamp" / "checksums.json").unlink()
    with pytest.raises(UserError, match="checksums.json"):
        load_split("svamp", "test", root=tmp_path)


def test_writing_one_split_does_not_bless_a_damaged_neighbour(tmp_path):
    path = write_split("svamp", "pool", [problem(7)], root=tmp_path)
    path.write_text(path.read_text().replace("7 + 1", "7 + 2"))
    write_split("svamp", "test", [problem(8)], root=tmp_path)
    with pytest.raises(UserError, match="differs from its recorded checksum"):
        load_split("svamp", "pool", root=tmp_path)


@pytest.mark.parametrize(
    "task, split, message",
    [("svanp", "pool", "known are anli"), ("nli", "train", "known are teacher, pool")],
)
def test_unknown_task_or_split(task, split, message):
    with pytest.raises(UserError, match=message):
        load_split(task, split)


# --- near-duplicates ---------------------------------------------------------------------------------------------------------


def brute_force(a, b, threshold, unit, size):
    sets = [[quality_module.shingles(x, unit, size) for x in xs] for xs in (a, b)]
    pairs = [
        (i, j, len(x & y) / len(x | y))
        for i, x in enumerate(sets[0])
        for j, y in enumerate(sets[1])
        if x | y
    ]
    return [p for p in pairs if p[2] >= threshold]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(words, max_size=8),
    st.lists(words, max_size=8),
    st.sampled_from([0.2, 0.5, 2 / 3, 0.9, 1.0]),
    st.sampled_from([("char", 1), ("char", 3), ("char", 5), ("word", 1), ("word", 2)]),
)
def test_near_duplicates_equal_brute_force(a, b, threshold, how):
    assert near_duplicates(a, b, threshold, unit=how[0], size=how[1]) == brute_force(
        a, b, threshold, *how
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(words, max_size=8))
def test_near_duplicates_within_one_set(a):
    assert near_duplicates(a, threshold=0.5) == [
        (i, j, s) for i, j, s in near_duplicates(a, a, 0.5) if i < j
    ]


def test_near_duplicates_see_through_case_and_punctuation_and_take_examples():
    a, b = (
        [problem(1, text="Ana has 3 red apples."), problem(2, text="Nobody came.")],
        ["question: ana has 3 RED apples"],
    )
    assert near_duplicates(a, b) == [(0, 0, 1.0)]
    assert (
        quality_module.near_duplicate_share(a, b) == 0.5
        and quality_module.near_duplicate_share(b, a) == 1.0
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: near_duplicates(["a"], ["b"], 0.0),
        lambda: near_duplicates(["a"], ["b"], 1.5),
        lambda: near_duplicates(["a"], ["b"], unit="line"),
        lambda: quality_module.near_duplicate_share([], ["b"]),
    ],
)
def test_near_duplicates_refuse(call):
    with pytest.raises(UserError):
        call()


def test_near_duplicates_are_fast_enough_and_find_what_was_planted():
    r, vocabulary = rng("speed"), [f"word{i}" for i in range(60)]
    text = [" ".join(r.choices(vocabulary, k=25)) for _ in range(4000)]
    planted = {int(i): f"{text[1000 + 2 * i]}!" for i in range(0, 1000, 100)}
    test = [planted.get(i, t) for i, t in enumerate(text[:1000])]
    start = time.process_time()
    found = near_duplicates(test, text[1000:], 0.9)
    assert [(i, j) for i, j, _ in found] == [(i, 2 * i) for i in planted]
    assert time.process_time() - start < 20  # about one second on an idle core


# --- templates and probes ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 999), min_size=2, max_size=4), st.data())
def test_template_filled_with_its_own_numbers_keeps_the_value(numbers, draw):
    question = "Ana has " + " and ".join(map(str, numbers)) + " figs."
    equation = f"( {draw.draw(st.sampled_from(numbers))}.0 + {draw.draw(st.sampled_from(numbers))} ) * {draw.draw(st.integers(1, 12))}"
    template = quality_module.equation_template(equation, question)
    assert "N" in template
    assert equation_value(quality_module.fill_template(template, question)) == equation_value(
        equation
    )


def test_template_uses_each_slot_once_before_any_again():
    assert (
        quality_module.equation_template("( 3 * 3 ) - 3", "3 rows of 3 pens") == "( N0 * N1 ) - N0"
    )
    assert quality_module.fill_template("N0 + N2", "3 rows of 3 pens") == ""


def toy_nli(n, stream, leak):
    r, out = rng(stream), []
    for i in range(n):
        label = r.choice(examples_module.NLI_LABELS)
        said = {"entailment": "surely", "neutral": "maybe", "contradiction": "never"}[
            label if leak else r.choice(examples_module.NLI_LABELS)
        ]
        out.append(
            Example(
                str(i),
                "nli",
                examples_module.nli_input(f"Item {r.randint(0, 99)} is here.", f"It is {said} so."),
                label,
            )
        )
    return out


def test_class_probes_find_a_planted_leak_and_nothing_else():
    leaky = surface_probes("nli", toy_nli(300, "a", True), toy_nli(300, "b", True))
    assert (
        all(score > 0.95 for name, score in leaky.items() if name != "majority")
        and leaky["majority"] < 0.45
    )
    clean = surface_probes("nli", toy_nli(300, "a", False), toy_nli(300, "b", False))
    assert all(score < 0.45 for score in clean.values())
    assert set(clean) == {"majority", "words", "chars", "last_part_words", "last_part_chars"}


def toy_cqa(n, stream, rule):
    r, out = rng(stream), []
    places = ["barn", "pond", "hive", "nest", "dock", "shelf", "attic"]
    for i in range(n):
        choices = r.sample(places, 5)
        gold = {
            "pair": r.choice(choices),
            "length": max(choices, key=lambda c: (len(c), c)),
            "position": choices[2],
        }[rule]
        thing = f"thing{places.index(gold)}" if rule == "pair" else f"thing{r.randint(0, 6)}"
        out.append(
            Example(
                str(i),
                "cqa",
                examples_module.choice_input(f"Where is the {thing}?", choices),
                gold,
                choices=tuple(choices),
            )
        )
    return out


def test_choice_probes_find_what_each_is_made_for():
    score = {
        rule: surface_probes("cqa", toy_cqa(400, "a", rule), toy_cqa(300, "b", rule))
        for rule in ("pair", "length", "position")
    }
    assert (
        score["pair"]["pairs"] > 0.95
        and score["pair"]["labels"] > 0.95
        and score["pair"]["choices_only"] < 0.4
    )
    assert score["length"]["choices_only"] > 0.9 and score["length"]["majority"] < 0.4
    assert score["position"]["majority"] == 1.0 and score["position"]["choices_only"] > 0.95


def test_closed_vocabulary_probe_answers_within_the_choices():
    train = [
        Example(
            str(i), "cqa", f"Question: a{i % 2}? Choices: x, y", "xy"[i % 2], choices=("x", "y")
        )
        for i in range(20)
    ]
    test = [
        Example("t", "cqa", "Question: a0? Choices: u, y", "u", choices=("u", "y")),
        Example("v", "cqa", "Question: a0? Choices: u, w", "u", choices=("u", "w")),
    ]
    assert quality_module._known_label(examples_module.TASKS["cqa"], train, test) == [
        "y",
        "u",
    ]  # x is not on offer; nothing known: the first choice


def toy_problems(n, stream):
    r = rng(stream)
    rows = [(r.randint(20, 90), r.randint(2, 19), r.random() < 0.5) for _ in range(n)]
    return [
        Example(
            str(i),
            "svamp",
            examples_module.problem_input(
                f"Ana has {a} figs and {'sells' if less else 'buys'} {b}. How many now?"
            ),
            f"( {a}.0 - {b}.0 )" if less else f"( {b}.0 + {a}.0 )",
        )
        for i, (a, b, less) in enumerate(rows)
    ]


def test_equation_probes_judge_by_value():
    scores = surface_probes("svamp", toy_problems(200, "a"), toy_problems(200, "b"))
    assert (
        scores["template_words"] == scores["template_chars"] == 1.0
    )  # "70" for "70.0" is right: judged by value
    assert 0.35 < scores["majority_template"] < 0.65 and scores["labels"] < 0.2


def test_probes_need_labels():
    with pytest.raises(UserError, match="labelled examples"):
        surface_probes(
            "nli",
            toy_nli(9, "a", True),
            [examples_module.withhold(ex) for ex in toy_nli(9, "b", True)],
        )


def test_probes_name_an_example_whose_label_is_not_allowed():
    bad = Example("c9", "cqa", "Question: a? Choices: x, y", "z", choices=("x", "y"))
    with pytest.raises(UserError, match="example c9: the label 'z' is not among the choices"):
        surface_probes("cqa", [bad], [bad])


def test_probes_do_not_depend_on_the_hash_seed():
    call = (
        "[surface_probes('cqa', toy_cqa(80, 'a', 'length'), toy_cqa(60, 'b', 'length')),"
        "near_duplicates(['one two three', 'two three one'], ['three one two'], 0.1)]"
    )
    code = f"import sys; sys.path.insert(0, 'tests'); from test_data import *; print(json.dumps({call}))"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=env,
        cwd=Path(__file__).parents[1],
    )
    here = [
        surface_probes("cqa", toy_cqa(80, "a", "length"), toy_cqa(60, "b", "length")),
        near_duplicates(["one two three", "two three one"], ["three one two"], 0.1),
    ]
    assert json.loads(run.stdout) == json.loads(json.dumps(here)) and here[0]["choices_only"] > 0.5


# --- real sets: fixtures of our own invention ----------------------------------------------------------------------------------

SIZES = {
    "esnli": None,
    "esnli_small": None,
    "anli": None,
    "anli_r3": None,
    "cqa": (9, 1, 10),
    "svamp": (7, 1, 2),
    "gsm8k": (8, 1, 1),
}
SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("name", SIZES)
def test_adapters_on_fixtures(name):
    splits = {s: load_real(name, s, folder=FIXTURES) for s in SPLITS}
    everything = [ex for part in splits.values() for ex in part]
    files = {
        line["id"]
        for f in adapters_module.REAL[name].files.values()
        for line in map(json.loads, (FIXTURES / f).read_text().splitlines())
    }
    assert {ex.id for ex in everything} == {f"{name}/{i}" for i in files} and len(
        everything
    ) == len(files)
    assert all(
        ex.task == adapters_module.REAL[name].task and ex.meta["set"] == name for ex in everything
    )
    assert all(splits[s] for s in SPLITS)
    if SIZES[name] is None:  # no premise on both sides, so sizes are only near the shares
        premises = [
            {examples_module.split_input("nli", ex.input)[0] for ex in splits[s]} for s in SPLITS
        ]
        assert (
            not premises[0] & premises[1]
            and not premises[0] & premises[2]
            and not premises[1] & premises[2]
        )
    else:
        assert tuple(len(splits[s]) for s in SPLITS) == SIZES[name]


def by_id(name, split="train", **how):
    return {
        ex.id: ex
        for s in ([split] if split != "all" else SPLITS)
        for ex in load_real(name, s, folder=FIXTURES, **how)
    }


def test_what_each_adapter_makes_of_a_row():
    ex = by_id("esnli", "all")["esnli/img1.jpg#3n"]
    assert (
        ex.input
        == "Premise: A boy in rubber boots jumps into a puddle . Hypothesis: A child gets wet feet ."
    )
    assert (ex.label, ex.rationale) == ("neutral", "Rubber boots may keep feet dry .") and len(
        ex.meta["explanations"]
    ) == 2
    ex = by_id("anli", "all")["anli/r1-0000"]
    assert (
        ex.label == "entailment"
        and ex.meta["teacher_probs"]["model-a"][0] == 0.9
        and ex.meta["tags"] == ["Basic"]
    )
    ex = by_id("cqa", "all")["cqa/tr01"]
    assert (
        ex.input
        == "Question: What do you need to open a tin? Choices: spoon, tin opener, ruler, candle, stamp"
    )
    assert (
        ex.label == "tin opener" == ex.choices[1]
        and ex.rationale == "tins are opened with a tin opener"
    )
    ex = by_id("svamp", "all")["svamp/chal-5"]
    assert ex.label == "( ( 50.0 - 12.0 ) - 7.0 )" and ex.input.startswith(
        "Question: Emil had 50 coins."
    )
    ex = by_id("gsm8k", "all")["gsm8k/train-3"]
    assert ex.label == "1500" and ex.rationale == "Three days give 3*500 = 1500 kg."


def test_asdiv_is_unlabelled_infix_and_without_repeats():
    gold = load_real("asdiv", "unlabelled", folder=FIXTURES, gold=True)
    answers = {
        r["id"]: r["answer"]
        for r in map(
            json.loads, (FIXTURES / "svamp_train_mawps_asdiv.jsonl").read_text().splitlines()
        )
    }
    assert [ex.id for ex in gold] == [
        f"asdiv/train-{i}" for i in range(10) if i != 8
    ]  # 8 repeats 0 with another blank
    assert all(
        equation_value(ex.label) == Fraction(str(answers[ex.id.removeprefix("asdiv/")]))
        for ex in gold
    )
    assert gold[1].label == "( ( 60.0 - 15.0 ) + 8.0 )" and gold[1].task == "svamp"
    assert load_real("asdiv", "unlabelled", folder=FIXTURES) == [
        examples_module.withhold(ex) for ex in gold
    ]


def test_n_takes_the_first_and_too_many_is_an_error():
    train = load_real("cqa", "train", folder=FIXTURES)
    assert load_real("cqa", "train", 4, folder=FIXTURES) == train[:4]
    for n in (0, 10, -1):
        with pytest.raises(UserError, match="cqa/train has 9 examples"):
            load_real("cqa", "train", n, folder=FIXTURES)


def test_svamp_split_is_the_papers():
    rows = [
        json.loads(line)["id"] for line in (FIXTURES / "svamp_test.jsonl").read_text().splitlines()
    ]
    order = np.random.RandomState(0).permutation(10)
    assert [ex.id for ex in load_real("svamp", "test", folder=FIXTURES)] == [
        f"svamp/{rows[i]}" for i in order[8:]
    ]
    held = np.random.default_rng(0).permutation(8)[:1]  # one tenth of eight, rounded up
    assert [ex.id for ex in load_real("svamp", "validation", folder=FIXTURES)] == [
        f"svamp/{rows[order[i]]}" for i in held
    ]


@pytest.mark.parametrize(
    "n, share, seed", [(10, 0.1, 0), (95, 0.1, 0), (9741, 0.1, 0), (50, 0.3, 7)]
)
def test_carve_is_train_test_split(n, share, seed):
    datasets = pytest.importorskip("datasets")
    both = datasets.Dataset.from_dict({"i": list(range(n))}).train_test_split(
        test_size=share, seed=seed
    )
    assert adapters_module.carve(range(n), share, seed) == (
        both["train"]["i"][:],
        both["test"]["i"][:],
    )


def test_filler_becomes_an_empty_rationale_and_keeps_its_label(tmp_path):
    rows = [
        json.loads(line)
        for line in (FIXTURES / "cqa_cose_v1.11_train.jsonl").read_text().splitlines()
    ]
    many = [
        {
            **r,
            "id": f"{r['id']}-{k}",
            "explanation": "This word fits best!" if k else r["explanation"],
        }
        for r in rows
        for k in (0, 1)
    ]
    append_jsonl(tmp_path / "cqa_cose_v1.11_train.jsonl", many)
    (tmp_path / "cqa_cose_v1.11_dev.jsonl").write_bytes(
        (FIXTURES / "cqa_cose_v1.11_dev.jsonl").read_bytes()
    )
    found = [ex for s in ("train", "validation") for ex in load_real("cqa", s, folder=tmp_path)]
    assert sorted(ex.id[-1] for ex in found if not ex.rationale) == ["1"] * 10
    assert all(
        ex.meta["filler"] == "This word fits best!" and ex.label in ex.choices
        for ex in found
        if not ex.rationale
    )


def test_absent_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("KD_NOTES_DATA", raising=False)
    with pytest.raises(
        UserError, match="KD_NOTES_DATA.*svamp_test.jsonl.*source='hub'.*ChilleD/SVAMP"
    ):
        load_real("svamp", "train")
    assert "esnli_small_train.jsonl and esnli_small_dev.jsonl" in public_module.why_absent(
        "esnli_small"
    ) and not public_module.why_absent("svamp", "hub")
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}/svamp_test.jsonl: the file .* is absent"):
        load_real("svamp", "train")
    monkeypatch.setenv("KD_NOTES_DATA", str(FIXTURES))
    assert public_module.why_absent("svamp") == "" and len(load_real("svamp", "train")) == 7


@pytest.mark.parametrize(
    "change, message",
    [
        ({"equation": None}, ":3: the field 'equation' should be text, not None"),
        ({"equation": "( 1.0 +"}, ":3: the label .* is not an equation"),
        ({"id": "chal-1"}, ":3: the id 'svamp/chal-1' was already used at .*:1"),
        (None, ":3: the field 'equation' is missing"),
    ],
)
def test_malformed_real_row_is_named(tmp_path, change, message):
    rows = [json.loads(line) for line in (FIXTURES / "svamp_test.jsonl").read_text().splitlines()]
    rows[2] = {"id": "x", "question": "y"} if change is None else {**rows[2], **change}
    append_jsonl(tmp_path / "svamp_test.jsonl", rows)
    with pytest.raises(UserError, match=message):
        load_real("svamp", "test", folder=tmp_path)


@pytest.mark.parametrize(
    "args, how, message",
    [
        (("squad", "train"), {}, "known are esnli, esnli_small, anli"),
        (("svamp", "pool"), {}, "svamp has train, validation, test"),
        (("svamp", "train"), {"source": "web"}, "Use 'folder' or 'hub'"),
        (("esnli_small", "train"), {"source": "hub"}, "not on the hub"),
    ],
)
def test_load_real_refuses(args, how, message):
    with pytest.raises(UserError, match=message):
        load_real(*args, folder=FIXTURES, **how)


@pytest.mark.parametrize("bad", ["+ 4", "3 4", "", "* + 3 4", "+ a 4"])
def test_prefix_to_infix_refuses(bad):
    with pytest.raises(ValueError):
        adapters_module.prefix_to_infix(bad)


# --- real sets: a local folder in the hub's layout -----------------------------------------------------------------------------


def fixture(name):
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text().splitlines()]


def nli_row(r, **more):
    return {
        "premise": r["premise"],
        "hypothesis": r["hypothesis"],
        "label": examples_module.NLI_LABELS.index(r["label"]),
        **more,
    }


def cose_row(r):
    return {
        "id": r["id"],
        "question": r["question"],
        "choices": r["choices"],
        "answer": r["answer_text"],
        "abstractive_explanation": r["explanation"],
        "extractive_explanation": r["explanation_selected"],
    }


def svamp_row(r):
    body, _, question = r["question"].rpartition(". ")
    return {
        "ID": r["id"],
        "Body": f"{body}.",
        "Question": question,
        "Equation": r["equation"],
        "Answer": str(r["answer"]),
        "Type": r["type"],
    }


def hub_repositories():
    "id -> (config, {split: rows in the hub's own fields}), from our invented fixtures"
    esnli = [
        nli_row(r, **{f"explanation_{k + 1}": (r["explanations"] + ["", ""])[k] for k in range(3)})
        for r in fixture("esnli_dev")
    ]
    anli = [nli_row(r, uid=r["id"], reason=r["reason"]) for r in fixture("anli_r1_dev")]
    gsm = [
        {"question": r["question"], "answer": f"{r['rationale']}\n#### {r['answer']}"}
        for r in fixture("gsm8k_train")
    ]
    svamp = [svamp_row(r) for r in fixture("svamp_test")]
    asdiv = [
        {
            "body": "Ana has 7 figs.",
            "question": "She gets 2. How many now?",
            "solution_type": "Addition",
            "answer": "9 (figs)",
            "formula": "7+2=9",
        },
        {
            "body": "Ben is x.",
            "question": "How old are both?",
            "solution_type": "System",
            "answer": "2; 3",
            "formula": "x+y=5; x=2",
        },
    ]
    return {
        "esnli/esnli": (
            None,
            {
                "train": esnli,
                "validation": esnli[:3],
                "test": [*esnli[3:6], {**esnli[6], "label": -1}],
            },
        ),
        "facebook/anli": (
            None,
            {f"{part}_r{k}": anli for part in ("train", "dev", "test") for k in (1, 2, 3)},
        ),
        "Salesforce/cos_e": (
            "v1.11",
            {
                "train": [cose_row(r) for r in fixture("cqa_cose_v1.11_train")],
                "validation": [cose_row(r) for r in fixture("cqa_cose_v1.11_dev")],
            },
        ),
        "ChilleD/SVAMP": (
            None,
            {
                "train": [svamp[i] for i in (9, 2, 5, 0, 7, 1, 3)],
                "test": [svamp[i] for i in (8, 4, 6)],
            },
        ),
        "openai/gsm8k": ("main", {"train": gsm[:6], "test": gsm[6:]}),
        "EleutherAI/asdiv": (None, {"validation": asdiv}),
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "A folder of hub repositories: parquet files, and a card that declares the configurations."
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hub")
    for repo, (config, splits) in hub_repositories().items():
        inner = config or "data"
        card = [f"configs:\n- config_name: {config or 'default'}\n  data_files:"]
        for split, rows in splits.items():
            (root / repo / inner).mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(
                root / repo / inner / f"{split}-00000-of-00001.parquet"
            )
            card.append(f"  - split: {split}\n    path: {inner}/{split}-*")
        (root / repo / "README.md").write_text("---\n" + "\n".join(card) + "\n---\n")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("KD_NOTES_HUB", str(root))
        m.setenv("KD_NOTES_CACHE", str(tmp_path_factory.mktemp("cache")))
        m.setenv("HF_HUB_OFFLINE", "1")
        yield root


def bare(examples):
    return [replace(ex, id="", meta={}) for ex in examples]


@pytest.mark.parametrize("name", ["cqa", "svamp"])
def test_hub_and_folder_give_the_same_splits(hub, name):
    for split in SPLITS:
        assert load_real(name, split, source="hub") == load_real(name, split, folder=FIXTURES)


def test_hub_splits_are_the_official_ones(hub):
    assert [len(load_real("esnli", s, source="hub")) for s in SPLITS] == [
        10,
        3,
        3,
    ]  # the row without agreement is left out
    everything = {ex.input: ex for ex in bare(by_id("esnli", "all").values())}
    assert all(everything[ex.input] == ex for ex in bare(load_real("esnli", "train", source="hub")))
    assert {ex.id for ex in load_real("anli", "test", source="hub")} == set(by_id("anli", "all"))
    gsm = {ex.input: ex for ex in bare(by_id("gsm8k", "all").values())}
    test = bare(load_real("gsm8k", "test", source="hub"))
    assert (
        len(test) == 4
        and all(gsm[ex.input] == ex for ex in test)
        and len(load_real("gsm8k", "validation", source="hub")) == 1
    )


def test_hub_asdiv_takes_the_left_side_and_leaves_systems_out(hub):
    (only,) = load_real("asdiv", "unlabelled", source="hub", gold=True)
    assert (
        only.label == "7+2" and only.input == "Question: Ana has 7 figs. She gets 2. How many now?"
    )


def test_hub_copy_that_is_absent_or_broken(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_HUB", str(tmp_path))
    with pytest.raises(UserError, match="hf download ChilleD/SVAMP"):
        load_real("svamp", "train", source="hub")
    assert "hf download" in public_module.why_absent("svamp", "hub")
    (tmp_path / "ChilleD" / "SVAMP").mkdir(parents=True)
    (tmp_path / "ChilleD" / "SVAMP" / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="the set did not load"):
        load_real("svamp", "train", source="hub")


def test_without_a_network_the_hub_says_so(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    code = "from kd_notes.data.public import load_real\nload_real('svamp', 'train', source='hub')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    env.pop("KD_NOTES_HUB", None)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (
        run.returncode != 0
        and "the set did not load" in run.stderr
        and "KD_NOTES_HUB" in run.stderr
    )


# --- real sets: the files themselves -------------------------------------------------------------------------------------------


class TestRealFiles:
    pytestmark = needs_real

    @pytest.mark.parametrize(
        "name, sizes",
        [
            ("esnli", None),
            ("esnli_small", None),
            ("anli", None),
            ("anli_r3", None),
            ("cqa", (8766, 975, 1221)),
            ("svamp", (720, 80, 200)),
            ("gsm8k", None),
        ],
    )
    def test_splits(self, name, sizes):
        splits = [load_real(name, s) for s in SPLITS]
        ids = [ex.id for part in splits for ex in part]
        assert len(ids) == len(set(ids))
        assert sizes is None or tuple(map(len, splits)) == sizes
        if examples_module.task_info(adapters_module.REAL[name].task).labels:
            assert {ex.label for part in splits for ex in part} == set(examples_module.NLI_LABELS)
            premises = [
                {
                    quality_module.normalise(examples_module.split_input("nli", ex.input)[0])
                    for ex in part
                }
                for part in splits
            ]
            assert (
                not premises[0] & premises[1]
                and not premises[0] & premises[2]
                and not premises[1] & premises[2]
            )

    def test_the_small_dev_set_is_part_of_the_large_one(self):
        large = {ex.id.removeprefix("esnli/") for s in SPLITS for ex in load_real("esnli", s)}
        assert {
            ex.id.removeprefix("esnli_small/")
            for s in ("validation", "test")
            for ex in load_real("esnli_small", s)
        } <= large
        assert (
            not {ex.id.removeprefix("esnli_small/") for ex in load_real("esnli_small", "train")}
            & large
        )

    def test_equations_have_the_value_that_the_file_says_but_for_the_sources_mistakes(self):
        answers = {
            f"asdiv/{r['id']}": r["answer"]
            for r in map(
                json.loads, Path(REAL, "svamp_train_mawps_asdiv.jsonl").read_text().splitlines()
            )
        }
        answers |= {
            f"svamp/{r['id']}": r["answer"]
            for r in map(json.loads, Path(REAL, "svamp_test.jsonl").read_text().splitlines())
        }
        rows = load_real("asdiv", "unlabelled", gold=True) + [
            ex for s in SPLITS for ex in load_real("svamp", s)
        ]
        assert len(rows) == 2727 + 1000
        wrong = [
            ex.id for ex in rows if abs(float(equation_value(ex.label)) - answers[ex.id]) > 1e-3
        ]
        assert len(wrong) <= 13, (
            f"{len(wrong)} disagree"
        )  # rounding and mistakes of the sources themselves

    def test_filler_is_about_a_tenth_of_cose(self):
        train = load_real("cqa", "train")
        assert 0.09 < np.mean([not ex.rationale for ex in train]) < 0.13

    def test_extra_inputs_do_not_repeat_the_test_set(self):
        assert (
            quality_module.near_duplicate_share(
                load_real("svamp", "test"), load_real("asdiv", "unlabelled"), 0.9
            )
            == 0.0
        )

    def test_hypothesis_alone_beats_the_majority_on_esnli(self):
        scores = surface_probes(
            "nli", load_real("esnli", "train", 2000), load_real("esnli", "validation")
        )
        assert scores["last_part_words"] > scores["majority"] + 0.1


# --- the module ----------------------------------------------------------------------------------------------------------------


def test_import_is_light():
    heavy = "torch transformers pandas sklearn scipy matplotlib datasets".split()
    code = f"import sys, kd_notes.data; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
