"""The bench measures what it says: the same loss in every arm, ratios that follow the work, absent peers with a reason."""
import time

import pytest
import torch

from kd_notes import bench as B
from kd_notes.core import UserError


def test_every_arm_that_runs_computes_the_same_loss_and_gradients():
    can, absent = B.present(["ours", "plain", *(["liger"] if B.importlib.util.find_spec("liger_kernel") else [])])
    found = {}
    for name in can:
        x = B.make_inputs(24, 90, 8)
        loss = B.ARMS[name](x)
        found[name] = (loss, *torch.autograd.grad(loss, x[:2]))
    assert {"ours", "plain"} <= set(found)
    for name, parts in found.items():
        for a, b in zip(parts, found["plain"]):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3, msg=name)


def test_an_absent_peer_is_reported_with_the_reason(monkeypatch):
    monkeypatch.setitem(B.NEEDS, "liger", "a_library_that_nobody_has")
    monkeypatch.setitem(B.ARMS, "trl", lambda x: 1/0)
    monkeypatch.delitem(B.NEEDS, "trl")
    can, absent = B.present(["ours", "liger", "trl"])
    assert can == ["ours"] and absent["liger"] == "not installed" and "ZeroDivisionError" in absent["trl"]
    rows = B.bench((8,), 40, 8, ("ours", "liger"), repeats=1, memory=False, gemm=64)
    assert {"arm": "liger", "absent": "not installed"} in rows and B.bars(rows)
    with pytest.raises(UserError, match="not an arm"):
        B.present(["lger"])


def test_a_ratio_follows_the_time(monkeypatch):
    monkeypatch.setattr(B, "gemm_rate", lambda *args, **kwargs: 1e9)  # a steady machine
    once = min(B.sample(lambda: time.sleep(0.02), 1e6, size=64).ratio for _ in range(5))
    thrice = min(B.sample(lambda: time.sleep(0.06), 1e6, size=64).ratio for _ in range(5))
    assert 1.5 < thrice/once < 6
    assert B.flops(2, 3, 5) == 8*2*3*5


def test_spread():
    assert B.spread([5.0]) == (5.0, 5.0, 5.0, 1)
    assert B.spread(range(9)) == (4, 2, 6, 9)
    with pytest.raises(UserError, match="nothing"):
        B.spread([])


def test_memory_is_that_of_the_arm_above_its_gradients():
    plain = [B.extra_memory("plain", 512, vocab, 8) for vocab in (15_000, 30_000)]
    assert plain[1] > 3*4*512*30_000/1e6             # both logits and a distribution at the least, 61 MB each
    assert plain[1]/plain[0] == pytest.approx(2, rel=0.1)  # and nothing but such arrays
    assert B.extra_memory("ours", 512, 30_000, 8) < plain[1]/2
    with pytest.raises(UserError, match="ended with"):
        B.extra_memory("nobody", 8, 8, 8)


def test_bars_compare_our_rows_only():
    rows = [{"arm": "ours", "tokens": 512, "ratio": 1.39, "MB": 251.0}, {"arm": "plain", "tokens": 512, "ratio": 9.0, "MB": 9e3}]
    assert [(b["promised"], b["met"]) for b in B.bars(rows)] == [(1.4, True), (250, False)]
