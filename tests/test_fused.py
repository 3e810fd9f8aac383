"""The fused loss equals the plain one, in value and gradient, for everything it takes; and it keeps its memory small."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kd_notes.losses.fused as fused_module
from kd_notes.core import UserError
from kd_notes.losses.divergences import DIVERGENCES, get_divergence
from kd_notes.losses.fused import (
    fused_cross_entropy,
    fused_linear_divergence,
    Samples,
    TopK,
)
from kd_notes.models.mini import mini_model

N, D, E, V = 21, 6, 9, 50
OPTIONS = [
    ("forward_kl", {}),
    ("forward_kl", {"floor": -5.0}),
    ("reverse_kl", {}),
    ("reverse_kl", {"floor": -5.0}),
    ("cross_entropy", {}),
    ("symmetric_kl", {"weight": 0.3}),
    ("jsd", {"beta": 0.2}),
    ("jsd", {"beta": 0.7, "scaled": True}),
    ("jsd", {"beta": 1.0, "scaled": True}),
    ("skew_kl", {"alpha": 0.3}),
    ("skew_kl", {"alpha": 0.0}),
    ("skew_reverse_kl", {"alpha": 0.4}),
    ("skew_reverse_kl", {"alpha": 0.0}),
    ("total_variation", {}),
    ("alpha_divergence", {"alpha": 0.3}),
    ("alpha_divergence", {"alpha": 1.7}),
    ("renyi", {"alpha": 2.0}),
    ("adaptive_kl", {"mu": 0.4}),
    ("dkd", {}),
    ("adaptive_kl", {"flipped": True}),
    ("atkd", {}),
    ("atkd", {"reverse": True}),
    ("label_revision", {"eta": 0.6, "sharpen": 1.5}),
    ("uld", {}),
]


def tensors(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def case(n=N, v=V, seed=0, dtype=torch.float64, scale=1.0):
    "Student hidden, weight, bias (with gradient); teacher hidden, weight, bias; gold ids; a mask with at least one True."
    make = [
        tensors(*shape, seed=seed + i, dtype=dtype, scale=s)
        for i, (shape, s) in enumerate(
            [((n, D), 1), ((v, D), scale), ((v,), 1), ((n, E), 1), ((v, E), 0.5), ((v,), 1)]
        )
    ]
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, generator=g) < 0.7
    mask[0] = True
    return (
        [t.requires_grad_() for t in make[:3]],
        make[3:],
        torch.randint(v, (n,), generator=g),
        mask,
    )


def with_targets(name, options, ids):
    needs_gold = name in ("dkd", "atkd", "label_revision")
    return options | ({"target_ids": ids} if needs_gold else {})


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_same(ours, expected, inputs, atol=1e-10, rtol=0.0):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol)
    for a, b in zip(gradients(ours, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def logits(hidden, weight, bias=None, scale=1.0, cap=None):
    z = scale * (hidden @ weight.t() + (0 if bias is None else bias))
    return z if cap is None else cap * torch.tanh(z / cap)


@pytest.mark.parametrize(
    "name, options",
    OPTIONS,
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items()),
)
def test_equals_the_plain_way_for_every_divergence(name, options):
    (h, w, b), (t, u, c), ids, mask = case()
    options = with_targets(name, options, ids)
    ours = fused_linear_divergence(
        h,
        w,
        t,
        u,
        name,
        mask,
        student_bias=b,
        teacher_bias=c,
        temperature=1.5,
        student_softcap=4.0,
        teacher_softcap=7.0,
        student_logit_scale=0.7,
        teacher_logit_scale=1.2,
        scale_t2=True,
        chunk=5,
        **options,
    )
    expected = get_divergence(name)(
        logits(h, w, b, 0.7, 4.0), logits(t, u, c, 1.2, 7.0), mask, 1.5, scale_t2=True, **options
    )
    assert_same(ours, expected, (h, w, b))


def test_the_list_above_has_every_divergence_of_the_registry():
    assert set(DIVERGENCES) <= {name for name, _ in OPTIONS}


@example("atkd", 1, 2, None, 1, 16, 429, 3.34375, 1.0)  # the teacher's logits round differently
@example("atkd", 10, 17, None, 1, 16, 0, 0.0625, 1.0)  # 1 - p_g is 1 but for rounding
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(
        ["forward_kl", "reverse_kl", "jsd", "skew_kl", "cross_entropy", "adaptive_kl", "atkd"]
    ),
    n=st.integers(1, 20),
    v=st.integers(2, 40),
    chunk=st.none() | st.integers(1, 25),
    block=st.integers(1, 50),
    strip=st.integers(16, 200),
    seed=st.integers(0, 999),
    temperature=st.floats(0.05, 10),
    scale=st.floats(0.01, 300),
)
def test_chunks_blocks_and_strips_change_nothing(
    name, n, v, chunk, block, strip, seed, temperature, scale
):
    (h, w, b), (t, u, c), ids, mask = case(n, v, seed, scale=scale)
    before, fused_module.BLOCK, fused_module.STRIP = (
        (fused_module.BLOCK, fused_module.STRIP),
        block,
        strip,
    )
    try:
        options = with_targets(name, {}, ids)
        ours = fused_linear_divergence(
            h, w, t, u, name, mask, student_bias=b, temperature=temperature, chunk=chunk, **options
        )
        expected = get_divergence(name)(logits(h, w, b), logits(t, u), mask, temperature, **options)
        size = 1 + max(g.abs().max().item() for g in gradients(expected, (h, w, b)))
        assert_same(ours, expected, (h, w, b), atol=1e-10 * size + 1e-12 * abs(expected.item()))
    finally:
        fused_module.BLOCK, fused_module.STRIP = before


def test_gradcheck():
    (h, w, b), (t, u, _), _, mask = case(5, 7)
    for name in ("reverse_kl", "jsd", "renyi"):
        assert torch.autograd.gradcheck(
            lambda *x, name=name: fused_linear_divergence(
                *x[:2], t, u, name, mask[:5], student_bias=x[2], chunk=2
            ),
            (h, w, b),
        )


def test_leading_dimensions_and_frozen_parts():
    (h, w, b), (t, u, _), _, mask = case(20)
    flat = fused_linear_divergence(h, w, t, u, mask=mask)
    shaped = fused_linear_divergence(h.view(4, 5, D), w, t.view(4, 5, E), u, mask=mask.view(4, 5))
    assert_same(shaped, flat, (h, w))
    only_hidden = fused_linear_divergence(h, w.detach(), t, u, mask=mask)
    torch.testing.assert_close(gradients(only_hidden, (h,)), gradients(flat, (h,)))
    assert not fused_linear_divergence(h.detach(), w.detach(), t, u).requires_grad


def test_student_equal_to_teacher_has_loss_zero_and_no_gradient():
    (_, _, _), (t, u, _), _, _ = case()
    h, w = t.clone().requires_grad_(), u.clone().requires_grad_()
    for name in DIVERGENCES.keys() - {"cross_entropy", "dkd", "atkd", "label_revision"}:
        loss = fused_linear_divergence(h, w, t, u, name)
        assert (
            abs(loss.item()) < 1e-12 and max(g.abs().max() for g in gradients(loss, (h, w))) < 1e-12
        ), name


def test_the_teacher_gets_no_gradient():
    (h, w, _), (t, u, c), _, _ = case()
    t, u, c = (x.requires_grad_() for x in (t, u, c))
    fused_linear_divergence(h, w, t, u, teacher_bias=c).backward()
    assert t.grad is None and u.grad is None and c.grad is None and h.grad is not None


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "adaptive_kl"])
def test_masked_positions_have_no_influence_even_when_poisoned(name):
    (h, w, _), (t, u, _), _, mask = case()
    loss = fused_linear_divergence(h, w, t, u, name, mask)
    poisoned, bad = h.detach().clone(), t.clone()
    poisoned[~mask], bad[~mask] = math.nan, math.inf
    poisoned.requires_grad_()
    again = fused_linear_divergence(poisoned, w, bad, u, name, mask)
    slope_h, slope_w = gradients(again, (poisoned, w))
    assert (
        again == loss
        and torch.equal(slope_w, gradients(loss, (w,))[0])
        and not slope_h[~mask].any()
    )


def test_masked_positions_are_never_computed(monkeypatch):
    (h, w, _), (t, u, _), _, mask = case()
    seen = []
    original = fused_module._logits
    monkeypatch.setattr(
        fused_module,
        "_logits",
        lambda head, rows, *a: (seen.append(head.hidden[rows].shape[0]), original(head, rows, *a)),
    )
    fused_linear_divergence(h, w, t, u, mask=mask)
    aligned = fused_module.ALIGNED  # positions of zeros fill the last product up
    assert set(seen) == {-(-int(mask.sum()) // aligned) * aligned}


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 37])
def test_padding_to_whole_products_changes_nothing(name, n, monkeypatch):
    "Positions of zeros are appended; 23 ids fit with 32 positions, so 37 take two chunks."
    monkeypatch.setitem(fused_module.BUDGET, "cpu", 2 * 23 * 32 * 8)
    draw = torch.Generator().manual_seed(n)
    h, t = (torch.randn(n, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    w, u = (torch.randn(23, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    b, c = (torch.randn(23, dtype=torch.float64, generator=draw) for _ in range(2))
    inputs = [x.requires_grad_() for x in (h, w, b)]
    ours = fused_linear_divergence(h, w, t, u, name, student_bias=b, teacher_bias=c)
    assert_same(ours, get_divergence(name)(h @ w.t() + b, t @ u.t() + c), inputs)


def test_chunks_are_even_and_whole_products():
    for n in (0, 1, 16, 171, 512, 2048):
        chunk = fused_module._even_chunk(n, 256)
        assert chunk % fused_module.ALIGNED == 0 and 0 < chunk <= 256
    assert fused_module._even_chunk(512, 240) == 176  # three of 171, rounded up


def test_a_denominator_makes_micro_batches_add_up():
    (h, w, _), (t, u, _), _, mask = case(20)
    whole, count = fused_linear_divergence(h, w, t, u, "jsd", mask), float(mask.sum())
    parts = sum(
        fused_linear_divergence(h[r], w, t[r], u, "jsd", mask[r], denominator=torch.tensor(count))
        for r in (slice(0, 3), slice(3, 20))
    )
    assert_same(parts, whole, (h, w), atol=1e-14)
    empty = fused_linear_divergence(h[:3], w, t[:3], u, "jsd", torch.zeros(3), denominator=count)
    assert empty == 0 and not any(g.any() for g in gradients(empty, (h, w)))


def test_padded_vocabulary_is_cut_on_purpose():
    (h, w, _), (t, u, _), _, _ = case()
    padded = torch.cat([w, tensors(2, D, seed=9)]).detach().requires_grad_()
    loss = fused_linear_divergence(h, padded, t, u)
    torch.testing.assert_close(loss, get_divergence("reverse_kl")(logits(h, w), logits(t, u)))
    assert not gradients(loss, (padded,))[0][V:].any()
    smaller = fused_linear_divergence(h, w, t, u, vocab_size=30)
    torch.testing.assert_close(
        smaller, get_divergence("reverse_kl")(logits(h, w)[:, :30], logits(t, u)[:, :30])
    )
    with pytest.raises(UserError, match="padding"):
        fused_linear_divergence(h, w, t, u[:30])
    assert_same(
        fused_linear_divergence(h, w, t, u[:30], "uld"),
        get_divergence("uld")(logits(h, w), logits(t, u[:30])),
        (h, w),
    )


def test_banned_tokens_by_a_bias_of_minus_infinity():
    (h, w, b), (t, u, c), _, _ = case()
    with torch.no_grad():
        b[3], c[3], c[4] = -math.inf, -math.inf, -math.inf
    for name in ("forward_kl", "jsd", "total_variation"):
        ours = fused_linear_divergence(h, w, t, u, name, student_bias=b, teacher_bias=c, chunk=4)
        assert ours.isfinite()
        assert_same(ours, get_divergence(name)(logits(h, w, b), logits(t, u, c)), (h, w, b))
    assert (
        fused_linear_divergence(h, w, t, u, "reverse_kl", student_bias=b, teacher_bias=c)
        == math.inf
    )


@pytest.mark.parametrize(
    "offset, scale, peak", [(0, 300, 0), (-150, 1, 0), (400, 1, 0), (0, 1, 500), (-90, 1, 200)]
)
@pytest.mark.parametrize(
    "name",
    [
        "forward_kl",
        "reverse_kl",
        "cross_entropy",
        "jsd",
        "skew_kl",
        "symmetric_kl",
        "total_variation",
    ],
)
def test_extreme_logits_in_float32(name, offset, scale, peak):
    "Large logits, all far from zero, and one token far above where the first block does not show it."
    (h, w, b), (t, u, c), _, _ = case(dtype=torch.float32, scale=scale)
    with torch.no_grad():
        b += offset
        b[-1] += peak
        c[-2] += peak
    before, fused_module.BLOCK = fused_module.BLOCK, 16
    try:
        ours = fused_linear_divergence(h, w, t, u, name, student_bias=b, teacher_bias=c, chunk=8)
    finally:
        fused_module.BLOCK = before
    h64, w64, b64 = (x.detach().double().requires_grad_() for x in (h, w, b))
    exact = get_divergence(name)(logits(h64, w64, b64), logits(t.double(), u.double(), c.double()))
    assert ours.isfinite()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    for a, e in zip(gradients(ours, (h, w, b)), gradients(exact, (h64, w64, b64))):
        torch.testing.assert_close(
            a.double(), e, rtol=1e-3, atol=2e-4 * max(1.0, e.abs().max().item())
        )


def test_temperature_near_zero_and_a_certain_teacher():
    (h, w, _), (t, u, _), _, _ = case(dtype=torch.float32)
    for name in ("forward_kl", "reverse_kl", "jsd", "skew_reverse_kl"):
        for temperature, factor in ((0.05, 1.0), (1.0, 1000.0)):
            loss = fused_linear_divergence(h, w, factor * t, u, name, temperature=temperature)
            expected = get_divergence(name)(
                logits(h, w), logits(factor * t, u), temperature=temperature
            )
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
            assert all(g.isfinite().all() for g in gradients(loss, (h, w)))


def test_scaled_repeated_and_recomputed_gradients():
    (h, w, b), (t, u, _), _, _ = case()
    loss = fused_linear_divergence(h, w, t, u, student_bias=b)
    first = gradients(loss, (h, w, b))
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(0)  # who got a gradient may change it
    for a, e in zip(gradients(0.25 * loss, (h, w, b)), kept):
        torch.testing.assert_close(a, 0.25 * e)
    assert_same(
        fused_linear_divergence(h, w, t, u, student_bias=b, recompute=True),
        loss,
        (h, w, b),
        atol=1e-14,
    )


def test_gradients_accumulate_in_grad():
    (h, w, _), (t, u, _), _, _ = case()
    for rows in (slice(0, 8), slice(8, N)):
        fused_linear_divergence(h[rows], w, t[rows], u, denominator=N).backward()
    torch.testing.assert_close(w.grad, gradients(fused_linear_divergence(h, w, t, u), (w,))[0])


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "adaptive_kl"])
def test_bfloat16_and_autocast(name):
    (h, w, b), (t, u, c), _, _ = case(dtype=torch.float32)
    low = [x.detach().bfloat16().requires_grad_() for x in (h, w, b)]
    high = [x.detach().float().requires_grad_() for x in low]
    teacher = [x.bfloat16() for x in (t, u)]
    ours = fused_linear_divergence(*low[:2], *teacher, name, student_bias=low[2], chunk=4)
    exact = fused_linear_divergence(
        *high[:2], *(x.float() for x in teacher), name, student_bias=high[2]
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact)
    for a, e in zip(gradients(ours, low), gradients(exact, high)):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), e, rtol=1e-2, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        under = fused_linear_divergence(low[0], high[1], *teacher, name, student_bias=high[2])
        slopes = gradients(under, (low[0], high[1]))
    torch.testing.assert_close(under, exact)
    assert [g.dtype for g in slopes] == [torch.bfloat16, torch.float32]


def test_cross_entropy_equals_torch():
    (h, w, b), _, ids, mask = case()
    ids[::5] = -100
    ours = fused_cross_entropy(h, w, ids, bias=b, softcap=5.0, logit_scale=0.8, chunk=4)
    assert_same(ours, torch.nn.functional.cross_entropy(logits(h, w, b, 0.8, 5.0), ids), (h, w, b))
    masked = fused_cross_entropy(h, w, ids, mask)
    expected = torch.nn.functional.cross_entropy(logits(h, w), ids.masked_fill(~mask, -100))
    torch.testing.assert_close(masked, expected)
    large = fused_cross_entropy(300 * h, w, ids)
    assert_same(
        large, torch.nn.functional.cross_entropy(logits(300 * h, w), ids), (h, w), atol=1e-5
    )


def coarse(z, ids):
    "The logits at `ids` and, as one further token, all others."
    return torch.cat(
        [z.gather(-1, ids), z.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)], -1
    )


@pytest.mark.parametrize(
    "name, options",
    [
        ("forward_kl", {}),
        ("reverse_kl", {}),
        ("jsd", {"beta": 0.2}),
        ("renyi", {}),
        ("total_variation", {}),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_topk_teacher(name, options, scale):
    (h, w, b), (t, u, _), _, mask = case(scale=scale)
    log = (logits(t, u) / 1.5).log_softmax(-1)
    ids = log.topk(7, -1).indices
    small = coarse(log, ids)
    cached = TopK(ids.int(), small[:, :-1], small[:, -1], temperature=1.5)
    ours = fused_linear_divergence(
        h,
        w,
        cached,
        None,
        name,
        mask,
        student_bias=b,
        student_softcap=6.0,
        temperature=1.5,
        chunk=4,
        **options,
    )
    expected = get_divergence(name)(
        coarse(logits(h, w, b, 1.0, 6.0) / 1.5, ids), small, mask, **options
    )
    assert_same(ours, expected, (h, w, b))
    full = get_divergence(name)(logits(h, w, b, 1.0, 6.0), logits(t, u), mask, 1.5, **options)
    assert 0 <= ours <= full + 1e-12


def test_topk_of_the_whole_vocabulary_is_the_full_divergence():
    (h, w, _), (t, u, _), _, _ = case()
    log = logits(t, u).log_softmax(-1)
    ids = log.argsort(-1, descending=True)
    cached = TopK(ids, log.gather(-1, ids), torch.full((N,), -math.inf))
    assert_same(fused_linear_divergence(h, w, cached), fused_linear_divergence(h, w, t, u), (h, w))


def test_sampled_teacher():
    (h, w, _), (t, u, _), _, mask = case()
    ids = torch.randint(V, (N, 4), generator=torch.Generator().manual_seed(1))
    weights = tensors(N, 4, seed=2).abs()
    weights[:, 3], weights[2] = 0, 0  # padding of a rectangle, and a position without any
    z = logits(h, w)
    values = weights.sum(-1) * z.logsumexp(-1) - (weights * z.gather(-1, ids)).sum(-1)
    assert_same(
        fused_linear_divergence(h, w, Samples(ids, weights), None, "cross_entropy", mask, chunk=4),
        values[mask].mean(),
        (h, w),
    )
    entropy = tensors(N, seed=3).abs()
    assert_same(
        fused_linear_divergence(h, w, Samples(ids, weights, entropy), None, "forward_kl"),
        (values - entropy).mean(),
        (h, w),
    )


@pytest.mark.parametrize(
    "change, match",
    [
        ({"divergence": "froward_kl"}, "forward_kl"),
        ({"beta": 0.5}, "no option"),
        ({"temperature": 0.0}, "temperature"),
        ({"chunk": -1}, "chunk"),
        ({"student_softcap": -1.0}, "softcap"),
        ({"student_weight": torch.zeros(D, V)}, "do not fit"),
        ({"student_bias": torch.zeros(3)}, "bias"),
        ({"teacher_hidden": torch.zeros(3, E, dtype=torch.float64)}, "positions"),
        ({"mask": torch.ones(3)}, "mask"),
        ({"mask": torch.zeros(N)}, "no unmasked"),
        ({"denominator": 0}, "denominator"),
        ({"teacher_weight": None}, "lm-head is missing"),
        ({"divergence": "dkd"}, "target_ids"),
        ({"divergence": "dkd", "target_ids": torch.full((N,), V)}, "vocabulary has"),
        (
            {
                "teacher_hidden": TopK(torch.zeros(N, 1).long(), torch.zeros(N, 1), torch.zeros(N)),
                "divergence": "adaptive_kl",
            },
            "cannot be had",
        ),
        (
            {
                "teacher_hidden": TopK(torch.zeros(N, 1).long(), torch.zeros(N, 1), torch.zeros(N)),
                "temperature": 2.0,
            },
            "cached at temperature",
        ),
        (
            {
                "teacher_hidden": Samples(torch.zeros(N, 1).long(), torch.ones(N, 1)),
                "divergence": "forward_kl",
            },
            "entropy",
        ),
        (
            {
                "teacher_hidden": Samples(torch.full((N, 1), V), torch.ones(N, 1)),
                "divergence": "cross_entropy",
            },
            "vocabulary has",
        ),
    ],
)
def test_mistakes_are_explained(change, match):
    (h, w, _), (t, u, _), _, _ = case()
    call = {
        "student_hidden": h,
        "student_weight": w,
        "teacher_hidden": t,
        "teacher_weight": u,
    } | change
    with pytest.raises(UserError, match=match):
        fused_linear_divergence(**call)


def test_a_user_function_in_the_registry_works(monkeypatch):
    monkeypatch.setitem(
        DIVERGENCES,
        "squared",
        lambda s, t, temperature=1.0: (
            ((s / temperature).softmax(-1) - (t / temperature).softmax(-1)).square().sum(-1)
        ),
    )
    (h, w, _), (t, u, _), _, _ = case()
    expected = DIVERGENCES["squared"](logits(h, w), logits(t, u), 2.0).mean()
    assert_same(
        fused_linear_divergence(h, w, t, u, "squared", temperature=2.0, chunk=4), expected, (h, w)
    )


def train_tied(loss_of, steps=5):
    "Losses of a few steps of a model with tied embeddings, and whether they are still tied."
    student, teacher = (mini_model("causal", "xs", 120, seed).train(seed == 0) for seed in (0, 1))
    optimizer, ids, losses = (
        torch.optim.AdamW(student.parameters(), lr=1e-2),
        torch.randint(3, 120, (4, 10)),
        [],
    )
    for _ in range(steps):
        with torch.no_grad():
            t = teacher.model(ids).last_hidden_state
        loss = loss_of(
            student.model(ids).last_hidden_state, student.lm_head.weight, t, teacher.lm_head.weight
        )
        (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, student.lm_head.weight is student.get_input_embeddings().weight


def test_training_a_model_with_tied_heads():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    ours, tied = train_tied(lambda *x: fused_linear_divergence(*x, chunk=16))
    torch.set_rng_state(state)
    expected, _ = train_tied(
        lambda h, w, t, u: get_divergence("reverse_kl")(logits(h, w), logits(t, u))
    )
    assert tied and ours[-1] < ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-4, atol=1e-6)


MEMORY = """
import json, torch
from kd_notes.losses.divergences import get_divergence
from kd_notes.losses.fused import fused_linear_divergence
n, v, d = {n}, 49152, 16
h, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
t, u = torch.randn(n, d), torch.randn(v, d)
fused_linear_divergence(h[:1], w[:64], t[:1], u[:64]).backward()
peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])/1024  # ru_maxrss starts at the parent's peak
before = peak()
{loss}.backward()
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_below_the_budget():
    def grown(n, loss):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY.format(n=n, loss=loss)],
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    fused_mb = grown(1024, "fused_linear_divergence(h, w, t, u)")
    plain_mb = grown(256, "get_divergence('reverse_kl')(h @ w.t(), t @ u.t())")
    assert fused_mb < 250, fused_mb
    assert plain_mb > fused_mb * 0.8, plain_mb  # with a quarter of the positions
    assert (
        grown(2048, "fused_linear_divergence(h, w, t, u)") < fused_mb * 1.1 + 10
    )  # twice the positions, no more memory


def test_products_in_bfloat16_are_near_and_float16_is_not_multiplied_in(monkeypatch):
    "What a GPU does: factors are rounded to the products' type, sums stay in float32."
    assert fused_module._product_dtype("cuda", torch.bfloat16, torch.float32) == torch.bfloat16
    assert (
        fused_module._product_dtype("cuda", torch.float16, torch.float32)
        == fused_module._product_dtype("cpu", torch.bfloat16, torch.float32)
        == torch.float32
    )

    def rounded(out, a, b, add=False):
        made = a.bfloat16().float() @ b.bfloat16().float()
        out.add_(made) if add else out.copy_(made)

    torch.manual_seed(0)
    x = [torch.randn(*shape) for shape in ((64, 32), (3000, 32), (64, 32), (3000, 32))]

    def gradients(name):
        h, w = (t.clone().requires_grad_() for t in x[:2])
        loss = fused_linear_divergence(h, 0.4 * w, x[2], 0.4 * x[3], name)
        loss.backward()
        return [loss.detach(), h.grad, w.grad]

    for name in ("reverse_kl", "forward_kl", "jsd", "cross_entropy"):
        exact = gradients(name)
        with monkeypatch.context() as patch:
            patch.setattr(fused_module, "_product", rounded)
            patch.setattr(fused_module, "_precisions", lambda *_: (torch.bfloat16, torch.float32))
            near = gradients(name)
        for a, b in zip(exact, near):
            assert (a - b).norm() < 0.03 * a.norm(), name


def test_uld_counts_the_ids_it_is_told_to():
    torch.manual_seed(0)
    h, w, t, u = torch.randn(5, 6), torch.randn(40, 6), torch.randn(5, 6), torch.randn(36, 6)
    want = get_divergence("uld")(h @ w[:30].t(), t @ u[:30].t())
    torch.testing.assert_close(fused_linear_divergence(h, w, t, u, "uld", vocab_size=30), want)


def test_the_losses_import_torch_and_two_small_libraries():
    "Beside this package and the standard library, which `sys.stdlib_module_names` lists."
    losses = sorted(path.stem for path in Path(fused_module.__file__).parent.glob("[a-z]*.py"))
    names = ", ".join(["kd_notes.losses", *(f"kd_notes.losses.{name}" for name in losses)])
    code = f"""
import sys, torch
top = lambda: {{m.partition(".")[0] for m in sys.modules}} - set(sys.stdlib_module_names)
before = top()
import {names}
print(sorted(top() - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        "fused" in losses and done.stdout.strip() == "['filelock', 'kd_notes', 'platformdirs']"
    )  # of core, 5 ms


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "dkd"])
def test_the_fused_loss_takes_labels(name):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 4, 8, requires_grad=True), torch.randn(11, 8)
    other, head = torch.randn(2, 4, 6), torch.randn(11, 6)
    labels = torch.tensor([[-100, 3, 10, -100], [0, -100, -100, -100]])
    loss = fused_linear_divergence(hidden, weight, other, head, name, labels=labels)
    plain = get_divergence(name)(hidden @ weight.T, other @ head.T, labels=labels)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (loss, plain)))
