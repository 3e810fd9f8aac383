"""Intervals, verdicts, tables and figures: the mathematics against other ways of computing it."""

import csv
import io
import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import kd_notes.evaluation.figures as figures_module
import kd_notes.evaluation.statistics as statistics_module
from kd_notes.core import UserError
from kd_notes.data.answers import pack_bits


# ---------------------------------------------------------------- bootstrap


def slow_bootstrap(table, draws, seed):
    "One draw at a time, by indexing: the definition."
    g = np.random.default_rng(seed)
    rows, columns = table.shape
    return np.array(
        [
            table[np.ix_(g.integers(0, rows, rows), g.integers(0, columns, columns))].mean()
            for _ in range(draws)
        ]
    )


def test_draws_have_the_distribution_of_the_definition():
    g = np.random.default_rng(0)
    table = (g.random((4, 30)) < 0.6).astype(float) + g.normal(0, 0.3, (4, 1))
    fast, slow = statistics_module._draw_means(table, 20_000, 1), slow_bootstrap(table, 20_000, 2)
    assert abs(fast.mean() - slow.mean()) < 0.01
    assert np.allclose(
        np.quantile(fast, [0.025, 0.25, 0.75, 0.975]),
        np.quantile(slow, [0.025, 0.25, 0.75, 0.975]),
        atol=0.012,
    )


def test_a_tiny_table_against_full_enumeration():
    table = np.array([[0.0, 1.0], [1.0, 3.0]])
    pairs = list(itertools.product([0, 1], repeat=2))
    exact = [table[np.ix_(r, c)].mean() for r in pairs for c in pairs]
    drawn = statistics_module._draw_means(table, 40_000, 0)
    assert set(np.round(drawn, 6)) == set(np.round(exact, 6))
    for value in set(exact):
        assert abs(np.mean(np.isclose(drawn, value)) - np.mean(np.isclose(exact, value))) < 0.01


def test_blocks_do_not_change_the_shape_or_the_mean():
    table = np.random.default_rng(0).random((2, 3000))  # 666 draws a block
    drawn = statistics_module._draw_means(table, 1500, 0)
    assert drawn.shape == (1500,) and abs(drawn.mean() - table.mean()) < 0.005


def test_ten_thousand_draws_of_5_by_1000_take_about_a_second_at_most():
    table = np.random.default_rng(0).random((5, 1000))
    statistics_module.hierarchical_bootstrap(table, draws=100)
    start = time.process_time()
    statistics_module.hierarchical_bootstrap(table)
    assert time.process_time() - start < 2.0  # 0.35 s on an idle core


def test_deterministic_and_seeded():
    table = np.random.default_rng(0).random((5, 50))
    assert statistics_module.hierarchical_bootstrap(
        table, draws=500
    ) == statistics_module.hierarchical_bootstrap(table, draws=500)
    assert statistics_module.hierarchical_bootstrap(
        table, draws=500, seed=1
    ) != statistics_module.hierarchical_bootstrap(table, draws=500)


def test_many_items_give_students_interval_over_seeds():
    scipy_stats = pytest.importorskip("scipy.stats")
    seeds = np.array([0.50, 0.53, 0.47, 0.55, 0.49, 0.51, 0.52, 0.46])
    table = np.repeat(seeds[:, None], 1000, axis=1)
    e = statistics_module.hierarchical_bootstrap(table, draws=40_000)
    low, high = scipy_stats.t.interval(0.95, 7, loc=seeds.mean(), scale=seeds.std(ddof=1) / 8**0.5)
    assert abs((e.high - e.low) / (high - low) - 1) < 0.05


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 10, 40])
def test_small_sample_factor_against_scipy(seeds):
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = (
        (seeds / (seeds - 1)) ** 0.5
        * scipy_stats.t.ppf(0.975, seeds - 1)
        / scipy_stats.norm.ppf(0.975)
    )
    assert statistics_module.small_sample_factor(seeds) == pytest.approx(expected, rel=1e-5)
    assert statistics_module.small_sample_factor(1) == 1.0


def test_seed_means_cover_the_true_mean_as_often_as_they_say_and_one_run_has_no_interval():
    g, hits = np.random.default_rng(5), 0
    for _ in range(200):
        runs = [{"length": x} for x in g.normal(16, 2, 5)]
        e = statistics_module.seed_means({"arm": runs}, ["length"])["arm", "length"]
        hits += e.low <= 16 <= e.high
    assert (
        0.88 <= hits / 200 <= 0.99
    )  # 95 % within three standard errors, and a little for five seeds
    alone = statistics_module.seed_means(
        {"a": [{"length": 4.0, "loss": 0.5}], "b": [{"length": 2.0}]}, ["length", "loss"]
    )
    assert set(alone) == {("a", "length"), ("b", "length"), ("a", "loss")}
    assert alone["a", "loss"].plain() == "0.5"
    assert alone["a", "loss"].as_run_metric() == {"value": 0.5, "n": 1}
    assert e.plain(4).count("[") == 1 and e.as_run_metric() == e.as_metric()


def test_one_seed_is_the_ordinary_bootstrap_over_items():
    g = np.random.default_rng(3)
    row = (g.random(500) < 0.3).astype(float)
    e = statistics_module.hierarchical_bootstrap(row)
    half = 1.96 * row.std() / 500**0.5
    assert e.n == 1 and e.items == 500
    assert e.low == pytest.approx(row.mean() - half, abs=0.006) and e.high == pytest.approx(
        row.mean() + half, abs=0.006
    )


def test_coverage_of_the_truth_with_lucky_seeds():
    "The promise itself: nominal 95 %. The interval over items alone breaks it on the same experiments."
    g, hits, naive = np.random.default_rng(7), 0, 0
    for i in range(200):
        table = (
            g.normal(0, 0.05, (5, 1)) + g.normal(0, 0.5, (1, 100)) + g.normal(0, 0.5, (5, 100))
        )  # truth 0
        e = statistics_module.hierarchical_bootstrap(table, draws=400, seed=i)
        hits += e.low <= 0 <= e.high
        means = table.mean(0)
        drawn = means[g.integers(0, 100, (400, 100))].mean(1)
        naive += np.quantile(drawn, 0.025) <= 0 <= np.quantile(drawn, 0.975)
    assert hits >= 186  # 95 % of 200 less three standard errors
    assert naive < hits


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 40), st.integers(0, 10_000))
def test_p_agrees_with_the_interval_and_shift_moves_both(seeds, items, seed):
    table = np.random.default_rng(seed).normal(0.2, 1, (seeds, items))
    e = statistics_module.hierarchical_bootstrap(table, draws=999)
    if not (abs(e.low) < 0.02 or abs(e.high) < 0.02):
        assert (e.p < 0.05) == (e.low > 0 or e.high < 0)
    moved = statistics_module.hierarchical_bootstrap(table + 3.0, draws=999)
    assert moved.low == pytest.approx(e.low + 3.0) and moved.high == pytest.approx(e.high + 3.0)
    flipped = statistics_module.hierarchical_bootstrap(-table, draws=999)
    assert flipped.low == pytest.approx(-e.high) and flipped.p == pytest.approx(e.p)


def test_pairing_narrows_the_interval():
    g = np.random.default_rng(0)
    hard = g.random((1, 500))
    a, b = (
        (g.random((5, 500)) * 0.1 + hard < 0.65) * 1.0,
        (g.random((5, 500)) * 0.1 + hard < 0.60) * 1.0,
    )
    pair = statistics_module.hierarchical_bootstrap(statistics_module.paired(a, b))
    other = statistics_module.hierarchical_bootstrap(
        statistics_module.paired(a, b[:, g.permutation(500)])
    )
    assert pair.value == pytest.approx(other.value)
    assert pair.high - pair.low < 0.5 * (other.high - other.low)


@pytest.mark.parametrize(
    "bad", [[], [[]], [[1.0, float("nan")]], np.zeros((2, 2, 2)), [float("inf")]]
)
def test_bad_tables_are_refused(bad):
    with pytest.raises(UserError):
        statistics_module.hierarchical_bootstrap(bad)


@pytest.mark.parametrize("a,b", [((5, 10), (5, 11)), ((5, 10), (4, 10))])
def test_unpairable_tables_are_refused(a, b):
    with pytest.raises(UserError, match="same seeds"):
        statistics_module.paired(np.zeros(a), np.zeros(b))


def test_stacking_packed_outcomes():
    rows = np.random.default_rng(0).random((3, 101)) < 0.5
    assert (statistics_module.stack_outcomes([pack_bits(r) for r in rows]) == rows).all()
    with pytest.raises(UserError, match="100"):
        statistics_module.stack_outcomes([pack_bits(rows[0]), pack_bits(rows[1][:100])])
    with pytest.raises(UserError):
        statistics_module.stack_outcomes([])


# ---------------------------------------------------------------- Holm, verdicts


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0, 1), max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p):
    adjusted = statistics_module.holm(p)
    rejected, still = set(), True
    for rank, name in enumerate(sorted(p, key=lambda k: p[k])):
        still = still and p[name] * (len(p) - rank) < 0.05
        rejected |= {name} if still else set()
    assert {name for name, value in adjusted.items() if value < 0.05} == rejected
    assert list(adjusted) == list(p) and all(p[k] <= adjusted[k] <= 1 for k in p)


def estimate(low, high, n=5, p=0.0002):
    return statistics_module.Estimate((low + high) / 2, low, high, n, 100, p)


def at(a, b, floor=0.33):
    "Accuracies of the two arms, and the floor."
    return {"arms": {"a": a, "b": b}, "floor": floor}


@pytest.mark.parametrize(
    "low,high,n,kw,outcome",
    [
        (0.01, 0.05, 5, {}, "supported"),
        (0.01, 0.05, 4, {}, "not testable"),
        (0.0, 0.05, 5, {}, "undecided"),
        (-0.01, 0.05, 5, {}, "undecided"),
        (-0.05, -0.01, 9, {}, "contradicted"),
        (-0.05, -0.01, 9, {"direction": "less"}, "supported"),
        (0.01, 0.05, 9, {"direction": "less"}, "contradicted"),
        (0.01, 0.05, 5, {"margin": 0.02}, "undecided"),
        (0.03, 0.05, 5, {"margin": 0.02}, "supported"),
        (-0.05, 0.01, 5, {"margin": 0.02}, "contradicted"),
        (-0.02, 0.005, 5, {"direction": "less", "margin": 0.01}, "supported"),
        (0.01, 0.05, 5, {"p": 0.06}, "undecided"),
        (0.01, 0.05, 5, {"p": 0.049}, "supported"),
        (-0.05, -0.01, 5, {"p": 0.06}, "undecided"),
        (-0.05, -0.01, 5, {"p": 0.049}, "contradicted"),
        # an arm at the floor decides nothing, on whichever side and whatever the interval
        (0.01, 0.05, 5, at(0.36, 0.5), "not testable"),
        (0.01, 0.05, 5, at(0.5, 0.36), "not testable"),
        (-0.05, -0.01, 5, at(0.2, 0.5), "not testable"),
        (0.01, 0.05, 5, at(0.361, 0.5), "supported"),
        (0.01, 0.05, 5, {"arms": {"a": 0.2}}, "supported"),
        # nor does an arm that is its start
        (0.01, 0.05, 5, {"moved": {"a": True, "b": False}}, "not testable"),
        (-0.05, -0.01, 5, {"moved": {"a": False, "b": True}}, "not testable"),
        (0.01, 0.05, 5, {"moved": {"a": True, "b": True}}, "supported"),
    ],
)
def test_verdict_table(low, high, n, kw, outcome):
    v = statistics_module.verdict("a claim", estimate(low, high, n), **kw)
    assert v.outcome == outcome
    assert f"[{100 * low:+.1f}, {100 * high:+.1f}] points, n = {n}" in str(v)
    assert str(v).startswith(f"a claim: {outcome} (")


def test_every_reason_names_what_decides():
    def why(*interval, **kw):
        return statistics_module.verdict("x", estimate(*interval), **kw).why

    assert why(0.01, 0.05, 3) == "3 seeds where a claim needs 5"
    assert why(0.01, 0.05, 1) == "1 seed where a claim needs 5"
    assert why(0.01, 0.05, **at(0.5, 0.36)) == "b within 3 points of the floor (33.0 %)"
    assert why(0.01, 0.05, moved={"a": False}) == "a not different from the start in any metric"
    assert why(-0.01, 0.05, margin=0.02) == "2 lies inside the interval"
    assert why(0.01, 0.05, p=0.2) == "Holm-adjusted p = 0.200"


def test_units_scale_and_show_the_interval():
    e = estimate(-0.04, -0.02)
    kl = statistics_module.verdict("x", e, unit="% of the KL")
    assert "-3.0 [-4.0, -2.0] % of the KL" in str(kl) and kl.as_dict()["value"] == -3
    nats = statistics_module.verdict("x", e, unit="nats")
    assert "-0.03 [-0.04, -0.02] nats" in str(nats) and nats.as_dict()["low"] == -0.04


@pytest.mark.parametrize(
    "kw",
    [
        {"direction": "bigger"},
        {"arms": {"a": 61.0}, "floor": 0.3},
        {"difference": estimate(0.2, 0.1)},
        {"floor": 33.0},
        {"kind": "guess"},
        {"unit": " "},
        {"claim": ""},
    ],
)
def test_bad_arguments_of_a_verdict(kw):
    with pytest.raises(UserError):
        statistics_module.verdict(**{"claim": "x", "difference": estimate(0.1, 0.2), **kw})


def test_holm_can_take_back_a_verdict():
    strong = estimate(0.05, 0.15)
    weak = estimate(0.005, 0.2, p=0.03)
    against = estimate(-0.2, -0.005, p=0.03)

    def outcomes(**estimates):
        return [v.outcome for v in statistics_module.verdicts("c", estimates)]

    assert outcomes(a=weak) == ["supported"] and outcomes(a=against) == ["contradicted"]
    assert outcomes(a=weak, b=weak) == ["undecided"] * 2
    assert outcomes(a=against, b=weak) == ["undecided"] * 2
    assert outcomes(a=strong, b=weak) == ["supported"] * 2
    [guess] = statistics_module.verdicts(
        "c", {"a": strong}, arms={"a": {"student": 0.3}}, floor={"a": 0.33}
    )
    assert guess.outcome == "not testable" and "(a)" in guess.claim
    [idle] = statistics_module.verdicts("c", {"a": strong}, moved={"a": {"MiniLLM": False}})
    assert idle.outcome == "not testable"


def test_an_arm_has_moved_if_one_metric_differs_after_holm():
    still = {f"metric {i}": estimate(-0.1, 0.1, p=0.5) for i in range(4)}
    assert not statistics_module.moved_from_start(still)
    # alone it would count; among five metrics it does not
    lucky = estimate(0.001, 0.1, p=0.02)
    assert statistics_module.moved_from_start({"loss": lucky})
    assert not statistics_module.moved_from_start(still | {"loss": lucky})
    assert statistics_module.moved_from_start(still | {"loss": estimate(0.4, 0.5)})


def test_the_best_mean_over_the_seeds_chooses_a_rate_and_an_end_of_the_grid_is_told():
    scores = {
        "one lucky seed": {1e-3: [0.2, 0.2], 2e-3: [0.5, 0.5], 4e-3: [0.9, 0.0]},
        "at the end": {1e-3: [0.6, 0.7], 2e-3: [0.5, 0.6], 4e-3: [0.1, 0.1]},
        "fewer rates": {2e-3: [0.4, 0.6]},
    }
    grid = statistics_module.RateGrid(scores)
    assert list(grid.best.values()) == [2e-3, 1e-3, 2e-3]
    assert grid.mean("one lucky seed", 4e-3) == pytest.approx(0.45)
    assert list(grid.edge.values()) == ["", "its best rate is the lowest of the grid", ""]
    assert grid.row("one lucky seed") == {
        "0.001": "20.0 / 20.0",
        "0.002": "50.0 / 50.0",
        "0.004": "90.0 / 0.0",
        "chosen": "0.002",
        "at an edge": "no",
    }
    assert grid.row("fewer rates")["0.004"] == "–"
    assert statistics_module.RateGrid({}).best == {}


def test_saved_verdicts_are_data_and_are_counted_by_kind(tmp_path):
    made = [
        statistics_module.verdict("helps (a)", estimate(0.1, 0.2)),
        statistics_module.verdict("helps (b)", estimate(-0.1, 0.2)),
        statistics_module.verdict("control", estimate(-0.1, 0.0), kind="control"),
    ]
    assert statistics_module.save_verdicts(iter(made), tmp_path) == made
    row = json.loads((tmp_path / "verdicts.json").read_text())[0]
    assert set(row) == {"claim", "kind", "outcome", "value", "low", "high", "n", "unit", "why"}
    assert row["value"] == 15 and row["unit"] == "points"
    loaded = statistics_module.load_verdicts(tmp_path / "verdicts.json")
    assert [str(v) for v in loaded] == [str(v) for v in made]
    assert statistics_module.count_outcomes(loaded) == {"supported": 1, "undecided": 1}
    assert statistics_module.count_outcomes(loaded, "question") == {}
    with pytest.raises(UserError, match="two verdicts"):
        statistics_module.save_verdicts([made[0], made[0]], tmp_path)
    (tmp_path / "verdicts.json").write_text('[{"claim": "x"}]')
    with pytest.raises(UserError, match="does not hold verdicts"):
        statistics_module.load_verdicts(tmp_path / "verdicts.json")


@pytest.mark.parametrize("side", ["better arm", "worse arm"])
def test_an_untrained_arm_makes_a_claim_untestable_on_either_side(side):
    clear = statistics_module.Estimate(0.2, 0.1, 0.3, 5, 100, 0.001)
    both = dict.fromkeys(("better arm", "worse arm"), "")
    fine = statistics_module.verdict("a beats b", clear, untrained=both)
    assert fine.outcome == "supported"
    why = both | {side: "its best rate is the lowest of the grid"}
    made = statistics_module.verdict("a beats b", clear, untrained=why)
    assert made.outcome == "not testable" and side in made.why and "lowest" in made.why
    [of_task] = statistics_module.verdicts("a beats b", {"nli": clear}, untrained={"nli": why})
    assert of_task.outcome == "not testable"


def test_runs_have_moved_if_one_metric_differs_and_not_if_none_does():
    g = np.random.default_rng(0)
    start = [{"loss": x, "length": 9.0, "best_step": 3} for x in g.normal(1, 0.1, 5)]
    further = [m | {"loss": m["loss"] - 0.3} for m in start]
    assert statistics_module.runs_moved(further, start)
    assert not statistics_module.runs_moved(start, start)
    other = [m | {"best_step": 100} for m in start]
    assert not statistics_module.runs_moved(other, start)  # that is no metric of the student
    with pytest.raises(ValueError):
        statistics_module.runs_moved(start[:4], start)


# ---------------------------------------------------------------- reported numbers


def test_reported_table_and_tags():
    rows = statistics_module.reported("dss")
    assert set(rows[0]) == {"paper", "artefact", "row", "dataset", "value", "unit", "tag", "note"}
    assert {r["paper"] for r in rows} == {"dss"} and {r["tag"] for r in rows} <= {
        "C",
        "A",
        "S",
        "S2",
        "I",
        "D",
        "M",
    }
    one = {(r["row"], r["dataset"]): r for r in statistics_module.reported("dss", "Table 1")}
    assert one["DSS, 540B PaLM rationales", "ANLI"]["value"] == 49.58
    assert one["DSS, 540B PaLM rationales", "ANLI"]["tag"] == "S2"
    assert one["DSS, 20B GPT-NeoX rationales", "SVAMP"]["tag"] == "S"
    assert len({(r["artefact"], r["row"], r["dataset"]) for r in rows}) == len(rows)


@pytest.mark.parametrize("paper", ["dss", "minillm", "akl", "atkd", "classic"])
def test_no_reported_number_is_from_memory_or_there_twice(paper):
    rows = statistics_module.reported(paper)
    assert not [r for r in rows if r["tag"] == "M" or "memory" in r["note"]]
    assert len({(r["artefact"], r["row"], r["dataset"], r["unit"]) for r in rows}) == len(rows)


def test_table_1_of_minillm_is_complete():
    rows = statistics_module.reported("minillm", "Table 1")
    rouge = {(r["row"], r["dataset"]): r["value"] for r in rows if r["unit"] == "Rouge-L"}
    sets = {"DollyEval", "SelfInst", "VicunaEval", "S-NI", "UnNI"}
    pairs = {row.split(", ")[1] for row, _ in rouge}
    assert len(pairs) == 7
    for pair in pairs:
        for method in ("SFT", "KD", "SeqKD", "MiniLLM"):
            assert {d for row, d in rouge if row == f"{method}, {pair}"} == sets
    # The gain over SFT lies out of domain.
    gains = {d: [] for d in sets}
    for pair in pairs:
        for d in sets:
            gains[d].append(rouge[f"MiniLLM, {pair}", d] - rouge[f"SFT, {pair}", d])
    assert min(gains["DollyEval"]) == pytest.approx(-0.1) and max(gains["DollyEval"]) < 3
    assert min(gains["S-NI"]) > 2 and max(gains["UnNI"]) > 10


def test_the_data_that_step_by_step_saves_are_reductions():
    rows = [r for r in statistics_module.reported("dss", "Figs. 4-5") if r["dataset"] != "e-SNLI"]
    assert {r["dataset"]: r["value"] for r in rows} == {"ANLI": 75, "CQA": 25, "SVAMP": 20}
    assert {r["unit"] for r in rows} == {"% of the data (reduction)"}
    assert all("reduced by" in r["note"] for r in rows)


def test_unknown_paper_or_artefact_names_the_known():
    with pytest.raises(UserError, match="dss"):
        statistics_module.reported("nothing")
    with pytest.raises(UserError, match="Table 1, Table 2"):
        statistics_module.reported("dss", "Table 7")


# ---------------------------------------------------------------- tables and figures


def test_results_table_in_markdown_and_text():
    table = figures_module.results_table(
        [
            {
                "arm": "a|b",
                "gain": statistics_module.Estimate(0.1, 0.05, 0.15, 5),
                "n": 5,
                "x": None,
            },
            {"arm": "c", "gain": {"value": 0.2, "low": 0.1, "high": 0.3, "n": 5}, "x": 0.123456},
        ],
        {"arm": "Arm", "gain": "Gain", "x": "X"},
    )
    md = table._repr_markdown_().splitlines()
    assert (
        md[0] == "| Arm | Gain | X |"
        and md[2] == "| a\\|b | 10.0 [5.0, 15.0] | – |"
        and md[3] == "| c | 20.0 [10.0, 30.0] | 0.1235 |"
    )
    assert str(table).splitlines()[0].startswith("Arm")
    with pytest.raises(UserError, match="arm"):
        figures_module.results_table([{"arm": 1}], ["arms"])


points = [
    {
        "panel": p,
        "arm": a,
        "x": n,
        "value": 0.4 + 0.1 * i,
        "low": 0.35 + 0.1 * i,
        "high": 0.5 + 0.1 * i,
        "n": 5,
    }
    for p in ("cqa", "svamp", "nli")
    for a in ("finetuning", "stepwise")
    for i, n in enumerate((250, 500, 1000))
]


def test_figure_shows_what_the_rows_say():
    fig = figures_module.accuracy_curve(
        points, teacher={"cqa": 0.8, "svamp": 0.7}, majority=0.2, xlabel="examples"
    )
    axes = [ax for ax in fig.axes if ax.axison]
    assert [ax.get_title() for ax in axes] == ["cqa", "svamp", "nli"]
    assert all(ax.get_ylabel() == "accuracy (%)" and ax.get_xlabel() == "examples" for ax in axes)
    assert [t.get_text() for t in axes[0].get_xticklabels()] == ["250", "500", "1k"]
    line = axes[0].containers[0].lines[0]
    assert np.allclose(line.get_ydata(), [40, 50, 60])
    segments = axes[0].containers[0].lines[2][0].get_segments()
    assert np.allclose(segments[1][:, 1], [45, 60])
    levels = [
        [
            ln.get_ydata()[0]
            for ln in ax.lines
            if len(set(ln.get_ydata())) == 1 and len(ln.get_xdata()) == 2
        ]
        for ax in axes
    ]
    assert levels == [[80, 20], [70, 20], [20]]
    assert (
        len(fig.legends) == 1
        and [t.get_text() for t in fig.legends[0].get_texts()].count("teacher") == 1
    )


def test_figure_and_twin_are_written_and_deterministic(tmp_path):
    saved = figures_module.save_figure(
        figures_module.accuracy_curve(points), tmp_path, "curve", points, alt="what it shows"
    )
    first = saved.png.read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) < 60_000
    figures_module.save_figure(figures_module.accuracy_curve(points), tmp_path, "curve", points)
    assert (tmp_path / "curve.png").read_bytes() == first
    back = list(csv.DictReader(io.StringIO((tmp_path / "curve.csv").read_text())))
    assert (
        len(back) == len(points)
        and {float(r["value"]) for r in back} == {0.4, 0.5, 0.6}
        and back[0]["panel"] == "cqa"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.csv", "curve.png"]


def test_the_description_of_a_figure_reaches_the_reader(tmp_path, monkeypatch):
    "As metadata of the image, and as an output: few front ends show the former."
    import IPython.display

    shown = []
    monkeypatch.setattr(
        IPython.display, "display", lambda data, **options: shown.append((data, options))
    )
    fig = figures_module.accuracy_curve(points)
    alt = 'KD < MiniLLM & "SFT"'
    figures_module.save_figure(fig, tmp_path, "curve", points, alt)._ipython_display_()
    (image, options), (text, _) = shown
    assert set(image) == {"image/png", "text/plain"}
    assert options["metadata"]["image/png"]["alt"] == alt == text["text/plain"]
    assert "KD &lt; MiniLLM &amp; " in text["text/html"] and "<details>" in text["text/html"]
    assert str(tmp_path) not in image["text/plain"]


@pytest.mark.parametrize(
    "name,rows,text",
    [("../x", points, "lower-case"), ("A b", points, "lower-case"), ("ok", [], "rows")],
)
def test_save_figure_refuses(tmp_path, name, rows, text):
    with pytest.raises(UserError, match=text):
        figures_module.save_figure(figures_module.accuracy_curve(points), tmp_path, name, rows)
    assert not list(tmp_path.iterdir())


def test_arms_of_no_table_keep_their_look_and_differ():
    order = ["mine", "yours", "ours", "theirs"]
    full = figures_module.arm_styles(order)
    pair = figures_module.arm_styles(["theirs", "ours"], order)
    assert pair == {arm: full[arm] for arm in ("theirs", "ours")}
    styles = figures_module.arm_styles([*figures_module._ARMS, *map(str, range(200))])
    assert len({str(look) for look in styles.values()}) == len(styles)
    seven = list(figures_module.arm_styles([str(i) for i in range(7)]).values())
    assert len({look["color"] for look in seven}) > 5


def test_every_arm_of_the_experiments_has_one_look_by_name_and_by_title():
    from kd_notes.experiments import equal_time, instruction_world, stepwise

    families = [
        {name: arm.title for name, arm in stepwise.ARMS.items()},
        {name: arm.title for name, arm in instruction_world.WORLD_ARMS.items()},
        equal_time.PAIR_ARMS,
    ]
    for arms in families:
        assert set(arms) | set(arms.values()) <= set(figures_module._LOOKS)
        by_name = figures_module.arm_styles(list(arms))
        by_title = figures_module.arm_styles(list(arms.values()))
        assert list(by_name.values()) == list(by_title.values())
        assert len({str(look) for look in by_name.values()}) == len(arms)


@pytest.mark.parametrize("colour", figures_module.OKABE_ITO)
def test_colours_are_dark_enough_for_lines_on_white(colour):
    "WCAG 2, contrast of graphical objects: at least 3:1."
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))
    assert 1.05 / (luminance + 0.05) >= 3


def test_palette_stays_apart_without_red_green_vision():
    "Colours as seen with deuteranopia (Machado et al. 2009, severity 1) keep a distance."
    seen = np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    )
    rgb = (
        np.array(
            [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in figures_module.OKABE_ITO]
        )
        @ seen.T
    )
    distance = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + np.eye(len(rgb))
    assert distance.min() > 0.12


def test_import_is_light():
    code = "import sys, kd_notes.evaluation.statistics, kd_notes.evaluation.figures; print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib', 'scipy') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_an_interval_plot_has_a_panel_for_each_world_and_an_arm_in_each_row():
    rows = [
        {"arm": a, "panel": w, "value": 0.4, "low": 0.3, "high": 0.6} for w in "xy" for a in "abc"
    ]
    fig = figures_module.interval_plot(rows, "share (%)", 100)
    assert [ax.get_title() for ax in fig.axes] == ["x", "y"] and fig.axes[
        0
    ].get_xlabel() == "share (%)"
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["a", "b", "c"] and len(
        fig.axes[1].containers
    ) == 3
    assert (
        len(figures_module.interval_plot([{"arm": "a", "value": 1, "low": 0, "high": 2}], "x").axes)
        == 1
    )


def test_a_reliability_diagram_is_labelled():
    fig = figures_module.reliability_diagram({"a": [{"n": 2, "confidence": 0.6, "accuracy": 0.5}]})
    assert fig.axes[0].get_xlabel() == "confidence" and fig.axes[0].get_ylabel() == "accuracy"


def test_the_interval_of_an_accuracy_stays_within_zero_and_one_and_others_do_not():
    right = np.ones((3, 100))
    right[0, :8] = 0
    assert (
        statistics_module.hierarchical_bootstrap(right).high == 1
        and statistics_module.hierarchical_bootstrap(1 - right).low == 0
    )
    assert (
        statistics_module.hierarchical_bootstrap(right + 0.5).high > 1.5
    )  # no share of right answers
