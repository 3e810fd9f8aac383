"""The bench measures what it says: the same loss in every arm, ratios that follow the work, absent peers with a reason."""

import threading
import time

import pytest
import torch

import kd_notes.experiments.bench_loss as bench_loss_module
import kd_notes.experiments.bench_steps as bench_steps_module
import kd_notes.experiments.benchmarks as benchmarks_module
from kd_notes.core import UserError


def test_every_arm_that_runs_computes_the_same_loss_and_gradients():
    can, absent = bench_loss_module.present(
        [
            "ours",
            "plain",
            *(["liger"] if bench_loss_module.importlib.util.find_spec("liger_kernel") else []),
        ]
    )
    found = {}
    for name in can:
        x = bench_loss_module.make_inputs(24, 90, 8)
        loss = bench_loss_module.LOSS_ARMS[name](x)
        found[name] = (loss, *torch.autograd.grad(loss, x[:2]))
    assert {"ours", "plain"} <= set(found)
    for name, parts in found.items():
        for a, b in zip(parts, found["plain"]):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3, msg=name)


def test_an_absent_peer_is_reported_with_the_reason(monkeypatch):
    monkeypatch.setitem(bench_loss_module.NEEDS, "liger", "a_library_that_nobody_has")
    monkeypatch.setitem(bench_loss_module.LOSS_ARMS, "trl", lambda x: 1 / 0)
    monkeypatch.delitem(bench_loss_module.NEEDS, "trl")
    can, absent = bench_loss_module.present(["ours", "liger", "trl"])
    assert (
        can == ["ours"]
        and absent["liger"] == "not installed"
        and "ZeroDivisionError" in absent["trl"]
    )
    rows = bench_loss_module.bench((8,), 40, 8, ("ours", "liger"), repeats=1, memory=False, gemm=64)
    assert {"arm": "liger", "absent": "not installed"} in rows and benchmarks_module.bars(rows)
    with pytest.raises(UserError, match="not an arm"):
        bench_loss_module.present(["lger"])


def test_a_ratio_follows_the_time(monkeypatch):
    monkeypatch.setattr(
        bench_loss_module, "gemm_rate", lambda *args, **kwargs: 1e9
    )  # a steady machine
    once = min(
        bench_loss_module.time_once(lambda: time.sleep(0.02), 1e6, size=64).ratio for _ in range(5)
    )
    thrice = min(
        bench_loss_module.time_once(lambda: time.sleep(0.06), 1e6, size=64).ratio for _ in range(5)
    )
    assert 1.5 < thrice / once < 6
    assert bench_loss_module.flops(2, 3, 5) == 8 * 2 * 3 * 5


def test_spread():
    assert bench_loss_module.spread([5.0]) == (5.0, 5.0, 5.0, 1)
    assert bench_loss_module.spread(range(9)) == (4, 2, 6, 9)
    with pytest.raises(UserError, match="nothing"):
        bench_loss_module.spread([])


def test_memory_is_that_of_the_arm_above_its_gradients():
    plain = [bench_loss_module.extra_memory("plain", 512, vocab, 8) for vocab in (15_000, 30_000)]
    assert (
        plain[1] > 3 * 4 * 512 * 30_000 / 1e6
    )  # both logits and a distribution at the least, 61 MB each
    assert plain[1] / plain[0] == pytest.approx(2, rel=0.1)  # and nothing but such arrays
    assert bench_loss_module.extra_memory("ours", 512, 30_000, 8) < plain[1] / 2
    with pytest.raises(UserError, match="ended with"):
        bench_loss_module.extra_memory("nobody", 8, 8, 8)


def steps_at(units: int, *rates: float) -> list:
    return [bench_steps_module.Step(units, 0.5, rate, 1.0, {}) for rate in rates]


def test_share_and_speed_are_corrected_by_the_rate_of_their_own_step():
    "Two steps of half a second, one while the machine is half as fast: 6 N tokens/s over the rate is twice as high there."
    found = {"ours": [steps_at(100, 2e9, 1e9)], "padded loop": [steps_at(50, 2e9, 2e9)]}
    share, its_share, speed = benchmarks_module.turn_rows(
        {"part": "loop", "case": "x"}, found, {}, work=6 * 1e6
    )
    assert (share["low"], share["high"], share["n"]) == (0.6, 1.2, 2) and its_share[
        "ratio"
    ] == pytest.approx(0.3)
    assert speed["arm"] == "padded loop" and speed["n"] == 1  # one turn is one ratio
    assert speed["ratio"] == pytest.approx((200 / 1.5e9) / (100 / 2e9))


def test_parts_of_a_step_are_in_units_of_our_step():
    parts = [dict(zip(bench_steps_module.PARTS, t)) for t in ((1.0, 0.5, 0.5), (4.0, 1.0, 1.0))]
    found = {
        "ours": [[bench_steps_module.Step(8, 2.0, 1e9, 1.0, parts[0])]],
        "TRL": [[bench_steps_module.Step(8, 6.0, 1e9, 1.0, parts[1])]],
    }
    rows = [
        r
        for r in benchmarks_module.turn_rows({"part": "on-policy", "case": "x"}, found, {})
        if r["measure"] in bench_steps_module.PARTS
    ]
    assert [r["ratio"] for r in rows] == [0.5, 0.25, 0.25, 2.0, 0.5, 0.5]


def turns_of(training, counts, gemm=32, **call):
    "Turns of so many steps each."
    answers = []
    bench_steps_module.serve(training, iter([*counts, None]).__next__, answers.append, gemm, **call)
    return answers


def test_a_training_waits_for_its_turn_and_ends_when_nobody_asks():
    done, ended = [], []

    def run(step):
        try:
            for i in range(5):
                done.append(i)
                step(i)
        finally:
            ended.append(True)

    asked = []

    def ask():
        asked.append(list(done))
        return [1, 2, None][len(asked) - 1]

    answers = []
    bench_steps_module.serve(run, ask, answers.append, 32)
    assert asked == [[], [0], [0, 1, 2]]  # nothing is done while it waits
    assert [[s.units for s in turn] for turn in answers] == [[0], [1, 2]] and ended
    with pytest.raises(ZeroDivisionError):
        turns_of(lambda step: 1 / 0, [1])


def test_the_unit_is_measured_in_the_thread_that_trains(monkeypatch):
    "Two threads that both compute take processors from each other: a loop was measured at three quarters of its speed."
    seen = set()
    monkeypatch.setattr(
        bench_steps_module, "unit", lambda arrays: seen.add(threading.get_ident()) or (1e9, 1.0)
    )
    trains = []

    def training(step):
        trains.append(threading.get_ident())
        while True:
            step(1)

    monkeypatch.setitem(benchmarks_module.STEPS, "toy", {"ours": training})
    found, _ = benchmarks_module.in_turns("toy", turns=2, count=2, gemm=32, fresh=False)
    assert seen == set(trains) and len(found["ours"]) == 2


def test_both_loops_train_on_the_same_rows_and_count_tokens_without_padding(monkeypatch):
    rows = bench_steps_module.token_rows(3, 9, n=8, vocab=50)
    monkeypatch.setattr(bench_steps_module, "token_rows", lambda *args, **kwargs: rows)
    assert all(3 <= len(r) <= 9 and r[-1] == 1 for r in rows)
    for arm in (bench_steps_module.our_loop, bench_steps_module.padded_loop):
        [turn] = turns_of(arm, [2], low=3, high=9, size="xs", batch=8, vocab=50)
        assert [step.units for step in turn] == [sum(map(len, rows))] * 2  # every row in every step


def test_the_trainer_learns_the_same_kl_as_ours():
    "On one batch: the peer's loss over whole padded logits is the mean of what our method sums."
    from kd_notes.data.dialogues import encode_row, load_prompts
    from kd_notes.methods.logit_kd import KD

    student, teacher, tokenizer = bench_steps_module.pair_models("mini")
    torch.nn.init.normal_(student.get_input_embeddings().weight, std=0.3)
    rows = [encode_row(row, tokenizer, max_length=64) for row in load_prompts("train")[:3]]
    inputs = bench_steps_module.padded(
        [r["prompt"] + r["completion"] for r in rows],
        tokenizer.pad_token_id,
        [len(r["prompt"]) for r in rows],
    )
    method = KD(tokenizer, teacher)
    batch = method.collate(rows)
    ours = method.loss_sums(student, batch)["kd"] / method.token_counts(batch)["kd"]
    torch.testing.assert_close(
        bench_steps_module.whole_logits_kl(student, teacher, inputs), ours, rtol=1e-4, atol=1e-5
    )


def test_a_peer_of_the_loop_that_is_missing_or_fails_is_absent_and_ours_is_measured(monkeypatch):
    def broken(step, **_):
        raise RuntimeError("no such kernel\nat line 3")

    tiny = dict(turns=2, count=2, gemm=32, fresh=False)
    monkeypatch.setitem(benchmarks_module.STEPS["on-policy"], "TRL", broken)
    monkeypatch.setitem(bench_loss_module.NEEDS, "TRL", "a_library_that_nobody_has")
    rows = benchmarks_module.bench_onpolicy("mini", 2, 3, **tiny)
    assert rows[0] == {"part": "on-policy", "case": "mini", "arm": "TRL", "absent": "not installed"}
    assert sum(r["ratio"] for r in rows[1:]) == pytest.approx(1, abs=0.5) and {
        r["n"] for r in rows[1:]
    } == {4}
    monkeypatch.delitem(bench_loss_module.NEEDS, "TRL")
    assert (
        benchmarks_module.bench_onpolicy("mini", 2, 3, **tiny)[0]["absent"]
        == "RuntimeError: no such kernel"
    )
    assert (
        benchmarks_module.bench_onpolicy("mini", 2, 3, peers=[], **tiny)[0]["absent"] == "left out"
    )
    monkeypatch.setitem(benchmarks_module.STEPS["on-policy"], "ours", broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        benchmarks_module.bench_onpolicy("mini", 2, 3, **tiny)


def test_an_arm_has_its_own_process_which_tells_why_it_ended():
    call = dict(low=4, high=9, batch=2, vocab=40)
    with (
        benchmarks_module.worker("loop", "ours", 32, size="xs", **call) as turn,
        benchmarks_module.worker("loop", "ours", 32, size="no such size", **call) as bad,
    ):
        first, second = turn(1), turn(2)
        assert [type(s) for s in first + second] == [bench_steps_module.Step] * 3 and all(
            8 <= s.units <= 18 and s.seconds > 0 for s in first + second
        )
        with pytest.raises(UserError, match="no such size"):
            bad(1)


def test_a_bar_without_its_peer_is_not_measured():
    label = {"part": "on-policy", "case": "smollm2", "arm": "TRL"}
    [open_bar] = benchmarks_module.bars([label | {"absent": "not installed"}])
    assert (open_bar["measured"], open_bar["met"], open_bar["absent"]) == (
        None,
        None,
        "not installed",
    )
    [bar] = benchmarks_module.bars(
        [
            label | {"measure": benchmarks_module.SPEED, "ratio": 1.49},
            {
                "part": "on-policy",
                "case": "mini",
                "arm": "TRL",
                "measure": benchmarks_module.SPEED,
                "ratio": 9,
            },
        ]
    )
    assert (bar["bar"], bar["promised"], bar["met"]) == ("on-policy: speed over TRL", 1.5, False)
    loop = [
        {
            "part": "loop",
            "case": case,
            "arm": arm,
            "measure": benchmarks_module.SHARE,
            "ratio": 0.52,
        }
        for case in benchmarks_module.LENGTHS
        for arm in ("ours", "padded loop")
    ]
    assert [(b["case"], b["promised"], b["met"]) for b in benchmarks_module.bars(loop)] == [
        ("fixed length", 0.55, False),
        ("variable length", 0.5, True),
    ]


def test_bars_compare_our_rows_only():
    rows = [
        {"arm": "ours", "tokens": 512, "ratio": 1.39, "MB": 251.0},
        {"arm": "plain", "tokens": 512, "ratio": 9.0, "MB": 9e3},
    ]
    assert [(b["promised"], b["met"]) for b in benchmarks_module.bars(rows)] == [
        (1.4, True),
        (250, False),
    ]
