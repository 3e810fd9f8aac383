"""How far a measured number may lie from the recorded one: every kind passes where it should, and fails where it should."""

import json
import random
from pathlib import Path

import pytest

from kd_notes.core import data_dir, read_json
from kd_notes.evaluation.statistics import hierarchical_bootstrap
from kd_notes.runner.tolerance import matching_spread, number_kind, seed_spreads, Tolerances

SPREADS = seed_spreads(data_dir() / "expected" / "runs")
RECORDS = sorted((data_dir() / "expected").glob("cpu*/*.json"))


def moved(number: dict, by: float) -> dict:
    return {key: x + by if key in ("value", "low", "high") else x for key, x in number.items()}


def mirrored(number: dict) -> dict:
    other = {"value": -number["value"], "low": -number["high"], "high": -number["low"]}
    return number | other


def record_row(path: Path, seed: int, arm: str = "kd", **metrics) -> None:
    row = {"params": {"arm": arm, "seed": seed}, "metrics": metrics}
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def test_spreads_come_from_groups_that_differ_in_their_seed_alone(tmp_path):
    for seed in range(3):
        record_row(tmp_path / "stage.jsonl", seed, length=10.0 + seed, text="a", good=True)
        record_row(tmp_path / "stage.jsonl", seed, arm="sft", length=100.0 + 10 * seed)
    record_row(tmp_path / "stage.jsonl", 0, arm="two seeds", loss=1.0)
    record_row(tmp_path / "stage.jsonl", 1, arm="two seeds", loss=9.0)
    spreads = seed_spreads(tmp_path)
    assert set(spreads) == {"length"}  # no text, no switch, nothing from two seeds
    assert spreads["length"].groups == 2
    assert 1.0 < spreads["length"].absolute <= 12.25
    assert seed_spreads(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    "name, metric",
    [
        ("repetition/teacher/xs", "repetition"),
        ("ece_bias/kd", "ece"),
        ("reverse_kl/student/sft/xs", "reverse_kl"),
        ("labels/nli", None),
        ("lossless/kd", None),
    ],
)
def test_the_spread_of_a_number_is_found_by_its_metric(name, metric):
    assert matching_spread(name, SPREADS) == (SPREADS[metric] if metric else None)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_record_agrees_with_itself_and_a_perturbed_one_does_not(path):
    "Each number of the project's record: as it is, moved far, and turned round."
    numbers = read_json(path)["numbers"]
    tolerances = Tolerances(numbers, SPREADS)
    for name, number in numbers.items():
        kind = number_kind(name, number)
        if kind == "cost":
            assert tolerances.judge(name, moved(number, 1e6)).status == "INFO"
            continue
        assert tolerances.judge(name, number).status == "PASS", name
        half_width = max(
            0.0, *(abs(number.get(e, number["value"]) - number["value"]) for e in ("low", "high"))
        )
        # a number without tolerance, such as a count of calls, may not move at all
        far = 3 * (tolerances.tolerance(name) + half_width) or 1.0
        for by in (far, -far):
            assert tolerances.judge(name, moved(number, by)).status == "FAIL", (name, by)
        assert tolerances.judge(name, number | {"n": 77}).status == "FAIL"
        if kind == "interval":
            assert (
                tolerances.judge(name, {"value": number["value"], "n": number["n"]}).status
                == "FAIL"
            )
            if number["low"] > 0 or number["high"] < 0:
                assert tolerances.judge(name, mirrored(number)).status == "FAIL"


SHARE = {"value": 0.60, "low": 0.57, "high": 0.63, "n": 5}
DIFFERENCE = {"value": 0.04, "low": 0.01, "high": 0.07, "n": 5}


@pytest.mark.parametrize(
    "name, recorded, measured, status",
    [
        # a share with an interval: by overlap
        ("rouge_l/a", SHARE, moved(SHARE, 0.02), "PASS"),
        ("rouge_l/a", SHARE, moved(SHARE, -0.04), "DRIFT"),
        ("rouge_l/a", SHARE, moved(SHARE, 0.07), "FAIL"),
        # a difference: by the side of zero that it decides
        ("difference/a", DIFFERENCE, moved(DIFFERENCE, 0.02), "PASS"),
        ("difference/a", DIFFERENCE, moved(DIFFERENCE, -0.02), "DRIFT"),
        ("difference/a", DIFFERENCE, mirrored(DIFFERENCE), "FAIL"),
        ("difference/a", moved(DIFFERENCE, -0.03), moved(DIFFERENCE, -0.04), "PASS"),
        ("difference/a", moved(DIFFERENCE, -0.03), moved(DIFFERENCE, 0.0), "DRIFT"),
        # a mean without an interval: by what replicates do
        ("repetition/teacher", {"value": 0.0017, "n": 1}, {"value": 0.0026, "n": 1}, "PASS"),
        ("repetition/teacher", {"value": 0.0017, "n": 1}, {"value": 0.05, "n": 1}, "FAIL"),
        ("rouge_l/teacher", {"value": 0.60, "n": 1}, {"value": 0.62, "n": 1}, "PASS"),
        ("rouge_l/teacher", {"value": 0.60, "n": 1}, {"value": 0.75, "n": 1}, "FAIL"),
        ("quality/usable", {"value": 0.90}, {"value": 0.93}, "PASS"),
        ("quality/usable", {"value": 0.90}, {"value": 0.70}, "FAIL"),
        # zero by construction
        ("forward_kl/teacher", {"value": 0.0, "n": 1}, {"value": 0.01, "n": 1}, "FAIL"),
        # a count
        ("parameters/xs", {"value": 291264}, {"value": 291264.0}, "PASS"),
        ("parameters/xs", {"value": 291264}, {"value": 291265}, "FAIL"),
        # a time and any other cost
        ("time/kd", {"value": 1.0}, {"value": 50.0}, "INFO"),
        ("MB/ours/512", {"value": 100.0}, {"value": 900.0}, "INFO"),
        ("ratio/ours", {"value": 1.2, "low": 1.1, "high": 1.3, "n": 3, "kind": "cost"}, {"value": 9}, "INFO"),
        # a tolerance that the notebook knows
        ("live/same", {"value": 0.875, "abs": 0.25}, {"value": 1.0}, "PASS"),
        ("live/same", {"value": 0.875, "abs": 0.25}, {"value": 0.5}, "DRIFT"),
        ("live/same", {"value": 0.875, "abs": 0.25}, {"value": 0.125}, "FAIL"),
    ],
)  # fmt: skip
def test_each_kind_of_number(name, recorded, measured, status):
    assert Tolerances({name: recorded}, SPREADS).judge(name, measured).status == status


def test_a_mean_over_seeds_without_an_interval_is_held_tighter_than_one_run():
    record = Tolerances(
        {"loss/a": {"value": 0.5, "n": 1}, "loss/b": {"value": 0.5, "n": 9}}, SPREADS
    )
    assert record.tolerance("loss/a") == pytest.approx(3 * record.tolerance("loss/b"))


def test_an_interval_that_is_narrow_by_luck_is_compared_as_wide_as_its_relatives():
    usual = {f"rouge_l/{i}": {"value": 0.5, "low": 0.46, "high": 0.54, "n": 3} for i in range(3)}
    lucky = {"value": 0.5, "low": 0.499, "high": 0.501, "n": 3}
    alone = Tolerances({"rouge_l/x": lucky}, SPREADS)
    among = Tolerances(usual | {"rouge_l/x": lucky}, SPREADS)
    other_metric = Tolerances(
        {f"loss/{name}": v for name, v in usual.items()} | {"rouge_l/x": lucky}, SPREADS
    )
    there = moved(lucky, 0.03)
    assert among.judge("rouge_l/x", there).status == "PASS"
    assert alone.judge("rouge_l/x", there).status == "FAIL"
    assert other_metric.judge("rouge_l/x", there).status == "FAIL"


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_machine_as_bad_as_another_seed_seldom_raises_a_false_alarm(seeds):
    "Twenty machines with twelve arms each; the same true values, other luck. A tenth of them would be too many."
    luck = random.Random(seeds)

    def machine(shift: float = 0.0) -> dict:
        arms = {}
        for i in range(12):
            values = [[0.3 + 0.03 * i + shift + luck.gauss(0, 0.01)] for _ in range(seeds)]
            arms[f"rouge_l/{i}"] = hierarchical_bootstrap(values, draws=400).as_metric()
        return arms

    def failures(shift: float) -> float:
        statuses = []
        for _ in range(20):
            record = Tolerances(machine(), SPREADS)
            statuses += [record.judge(name, x).status for name, x in machine(shift).items()]
        return statuses.count("FAIL") / len(statuses)

    assert failures(0.0) < 0.01
    assert failures(0.12) > 0.9
