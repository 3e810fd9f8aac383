"""Divergences: METHODS' ten checks for every loss of the registry, fixtures, second derivations, gradients, limits, and agreement with peers."""

import math
import os
import subprocess
import sys
import textwrap
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kd_notes.losses.cross_tokenizer as cross_tokenizer_module
from kd_notes.core import UserError
from kd_notes.losses.adaptive import adaptive_kl, head_weight
from kd_notes.losses.cross_tokenizer import (
    align_spans,
    align_vocabulary,
    aligned_span_loss,
    check_tokenizers,
    matching_tokens,
    Span,
    spans_in_order,
    token_ends,
    uld,
)
from kd_notes.losses.decoupled import atkd, dkd, easy_hard, log_uncertainty
from kd_notes.losses.divergences import (
    cross_entropy,
    DIVERGENCES,
    effective_denominator,
    forward_kl,
    get_divergence,
    jsd,
    next_token_labels,
    reverse_kl,
    _sides,
    token_divergence,
)
from kd_notes.losses.families import (
    alpha_divergence,
    renyi,
    skew_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from kd_notes.losses.revision import label_revision, revised_side

VARIANTS = [  # every entry of the registry, some with several settings
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("symmetric_kl", {}),
    ("symmetric_kl", {"weight": 0.2}),
    ("cross_entropy", {}),
    ("jsd", {}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9, "scaled": True}),
    ("jsd", {"beta": 0.0, "scaled": True}),
    ("skew_kl", {}),
    ("skew_reverse_kl", {}),
    ("total_variation", {}),
    ("alpha_divergence", {}),
    ("alpha_divergence", {"alpha": 0.2}),
    ("renyi", {}),
    ("renyi", {"alpha": 3.0}),
    ("adaptive_kl", {}),
    ("adaptive_kl", {"mu": 0.8, "boundary": "crossing-in-head"}),
    ("adaptive_kl", {"flipped": True}),
    ("dkd", {}),
    ("dkd", {"alpha": 0.0, "beta": 1.0}),
    ("atkd", {}),
    ("atkd", {"reverse": True}),
    ("label_revision", {}),
    ("label_revision", {"eta": 0.5, "who": "wrong", "sharpen": 3.0}),
    ("label_revision", {"weight": 0.3}),
    ("uld", {}),
]
IDS = [name + "".join(f"-{k}={v}" for k, v in options.items()) for name, options in VARIANTS]
every = pytest.mark.parametrize("name, options", VARIANTS, ids=IDS)
NEEDS_GOLD = ("dkd", "atkd", "label_revision")


def with_gold(name, options, ids):
    return {**options, "target_ids": ids} if name in NEEDS_GOLD else options


def batch(rows=3, length=4, vocabulary=7, seed=0, dtype=torch.float64, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(rows, length, vocabulary, generator=g, dtype=torch.float64)
        for _ in range(2)
    )
    return (
        student.to(dtype),
        teacher.to(dtype),
        torch.randint(vocabulary, (rows, length), generator=g),
    )


def gradient(loss, z):
    return torch.autograd.grad(loss, z)[0]


def test_the_registry_is_covered():
    assert {name for name, _ in VARIANTS} == set(DIVERGENCES)
    assert {
        "forward_kl",
        "reverse_kl",
        "jsd",
        "symmetric_kl",
        "skew_kl",
        "skew_reverse_kl",
        "total_variation",
        "cross_entropy",
        "adaptive_kl",
        "atkd",
        "dkd",
        "uld",
        "alpha_divergence",
        "renyi",
        "label_revision",
    } <= set(DIVERGENCES)


def test_import_pulls_in_torch_and_nothing_heavier():
    code = """
        import sys, kd_notes.losses.divergences
        heavy = {"transformers", "pandas", "matplotlib", "scipy", "datasets", "accelerate", "trl", "peft"} & set(sys.modules)
        assert not heavy, heavy"""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- the ten checks, for every loss -----------------------------------------------------------------------------------------------


@every
def test_1_equal_models_give_zero_and_no_gradient(name, options):
    _, teacher, ids = batch()
    student = teacher.clone()
    if name == "label_revision":  # it is a divergence from the revised teacher
        student = revised_side(_sides(teacher, teacher, 1.0)[1], ids, **options).log
    student.requires_grad_()
    values = token_divergence(name, student, teacher, **with_gold(name, options, ids))
    expected = (
        -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
        if name == "cross_entropy"
        else torch.zeros(3, 4)
    )
    assert torch.allclose(values, expected.double(), atol=1e-12)
    assert gradient(values.sum(), student).abs().max() < 1e-12


@every
def test_2_a_constant_added_to_a_position_changes_nothing(name, options):
    student, teacher, ids = batch()
    options = with_gold(name, options, ids)
    shift = torch.arange(12, dtype=torch.float64).reshape(3, 4, 1) * 3 - 20
    assert torch.allclose(
        token_divergence(name, student + shift, teacher - 2 * shift, **options),
        token_divergence(name, student, teacher, **options),
    )


@every
def test_3_a_joint_permutation_of_the_vocabulary_changes_nothing(name, options):
    student, teacher, ids = batch()
    teacher = teacher.round()  # ties, which a sort would break by token id
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    plain = token_divergence(name, student, teacher, **with_gold(name, options, ids))
    moved = token_divergence(
        name,
        student[..., order],
        teacher[..., order],
        **with_gold(name, options, order.argsort()[ids]),
    )
    assert torch.allclose(plain, moved)


@every
@pytest.mark.parametrize("poison", [0.0, 1e4, math.nan, math.inf, -math.inf])
def test_4_padding_and_what_stands_in_it_change_nothing(name, options, poison):
    student, teacher, ids = batch()
    loss = get_divergence(name, **options)
    gold = {"target_ids": ids} if name in NEEDS_GOLD else {}
    plain = loss(student, teacher, **gold)
    wide_s, wide_t = (F.pad(x, (0, 0, 0, 2), value=poison) for x in (student, teacher))
    wide_s.requires_grad_()
    mask = torch.tensor([1, 1, 1, 1, 0, 0]).expand(3, 6)
    padded = loss(
        wide_s, wide_t, mask, **({"target_ids": F.pad(ids, (0, 2), value=-100)} if gold else {})
    )
    assert torch.allclose(plain, padded)
    slope = gradient(padded, wide_s)
    assert slope.isfinite().all() and not slope[:, 4:].any() and slope[:, :4].any()


@every
def test_5_prompt_positions_contribute_nothing(name, options):
    "Positions 0 and 1 predict prompt tokens; position 2 predicts the first response token."
    student, teacher, ids = batch(length=6)
    mask = torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.bool).expand(3, 6)
    gold = {"target_ids": ids} if name in NEEDS_GOLD else {}
    loss = partial(get_divergence(name, **options), teacher_logits=teacher, mask=mask, **gold)
    changed, last = student.clone(), student.clone()
    changed[:, :2] += torch.randn(3, 2, 7, dtype=torch.float64)
    last[:, 2] += torch.randn(3, 7, dtype=torch.float64)
    assert loss(student) == loss(changed) and loss(student) != loss(last)


@pytest.mark.parametrize(
    "name", ["forward_kl", "cross_entropy", "dkd", "skew_kl", "label_revision"]
)
def test_6_a_teacher_that_knows_only_the_gold_token_gives_the_language_model_loss(name):
    student, _, _ = batch(length=5)
    tokens = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(2))
    targets = tokens[:, 1:]  # position t predicts token t + 1
    delta = torch.full_like(student, -math.inf).scatter(-1, targets.unsqueeze(-1), 0.0)
    options = {
        "forward_kl": {},
        "cross_entropy": {},
        "dkd": {"target_ids": targets},
        "label_revision": {"target_ids": targets},
        "skew_kl": {"alpha": 0.0},
    }[name]
    lm = F.cross_entropy(student.flatten(0, 1), targets.flatten())
    assert torch.allclose(get_divergence(name)(student, delta, **options), lm)
    assert not torch.allclose(lm, F.cross_entropy(student.flatten(0, 1), tokens[:, :-1].flatten()))


@every
def test_7_the_teacher_gets_no_gradient(name, options):
    student, teacher, ids = batch()
    student.requires_grad_(), teacher.requires_grad_()
    get_divergence(name, **with_gold(name, options, ids))(student, teacher).backward()
    assert teacher.grad is None and student.grad.any()


@every
def test_8_tokens_that_both_ban_are_as_if_they_did_not_exist(name, options):
    student, teacher, ids = batch()
    keep = torch.tensor([0, 1, 3, 4, 6])
    ids = keep[ids % 5]
    small = with_gold(name, options, (keep == ids.unsqueeze(-1)).int().argmax(-1))
    wide = torch.full((7,), -math.inf, dtype=torch.float64).index_fill(0, keep, 0.0)
    a, b = student.clone().requires_grad_(), student[..., keep].clone().requires_grad_()
    banned = token_divergence(name, a + wide, teacher + wide, **with_gold(name, options, ids))
    sliced = token_divergence(name, b, teacher[..., keep], **small)
    assert torch.allclose(banned, sliced)
    slope = gradient(banned.sum(), a)
    assert (
        torch.allclose(slope[..., keep], gradient(sliced.sum(), b)) and not slope[..., [2, 5]].any()
    )


@every
def test_9_different_vocabularies_are_refused_or_aligned_on_purpose(name, options):
    student, teacher, ids = batch()
    narrow, ids = student[..., :5], ids % 5
    options = with_gold(name, options, ids)
    if name == "uld":
        assert torch.allclose(
            token_divergence(name, narrow, teacher),
            token_divergence(name, F.pad(narrow, (0, 2), value=-math.inf), teacher),
        )
        return
    with pytest.raises(
        UserError, match="5 logits of the student, 7 of the teacher.*align_vocabulary"
    ):
        token_divergence(name, narrow, teacher, **options)
    slices = token_divergence(name, *align_vocabulary(narrow, teacher, size=5), **options)
    bans = token_divergence(name, *align_vocabulary(narrow, teacher, size=5, how="-inf"), **options)
    assert torch.allclose(slices, bans) and torch.allclose(
        slices, token_divergence(name, narrow, teacher[..., :5], **options)
    )


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_10_at_least_float32_inside(name, options, dtype):
    student, teacher, ids = batch(dtype=dtype)
    options = with_gold(name, options, ids)
    z = student.clone().requires_grad_()
    values = token_divergence(name, z, teacher, **options)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    up = student.to(wanted).requires_grad_()
    reference = token_divergence(name, up, teacher.to(wanted), **options)
    assert values.dtype == wanted and torch.equal(values, reference)
    assert gradient(values.sum(), z).dtype == dtype
    assert torch.allclose(
        gradient(token_divergence(name, z, teacher, **options).sum(), z).to(wanted),
        gradient(reference.sum(), up),
        rtol=1e-2,
        atol=1e-3,
    )
    assert token_divergence(name, student, teacher.double(), **options).dtype == torch.float64


# --- values -----------------------------------------------------------------------------------------------------------------------

Z_T = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
Z_S = torch.tensor([0.0, 1.0, 0.5, -0.5], dtype=torch.float64)
GOLD = torch.tensor(1)


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("forward_kl", {}, 0.575376),
        ("reverse_kl", {}, 0.506811),
        ("cross_entropy", {}, 1.522913),
        ("symmetric_kl", {}, 0.541094),
        ("jsd", {"beta": 0.1}, 0.049885),
        ("jsd", {"beta": 0.5}, 0.127465),
        ("jsd", {"beta": 0.9}, 0.045281),
        ("skew_kl", {"alpha": 0.1}, 0.434175),
        ("skew_reverse_kl", {"alpha": 0.1}, 0.405532),
        ("total_variation", {}, 0.476509),
        ("uld", {}, 0.377720),
        ("adaptive_kl", {}, 0.541094),
        ("adaptive_kl", {"boundary": "crossing-in-head"}, 0.541094),
        ("dkd", {"target_ids": GOLD, "alpha": 1.0, "beta": 0.0}, 0.102312),
        ("dkd", {"target_ids": GOLD, "alpha": 0.0, "beta": 1.0}, 0.619910),
        ("atkd", {"target_ids": GOLD}, 0.8 * (0.102312 + 0.619910)),  # one position is a hard one
        ("atkd", {"target_ids": GOLD, "hard_fraction": 0.0}, 0.2 * 0.619910),
    ],
)
def test_fixture_1(name, options, expected):
    assert token_divergence(name, Z_S, Z_T, **options).item() == pytest.approx(expected, abs=1e-6)
    assert get_divergence(name, **options)(Z_S, Z_T).item() == pytest.approx(expected, abs=1e-6)


def test_fixture_1_of_label_revision():
    side = _sides(Z_T, Z_T, 1.0)[1]
    revised = revised_side(side, GOLD, eta=0.8).log.exp()
    wanted = [0.366112, 0.566112, 0.049548, 0.018228]
    assert revised.tolist() == pytest.approx(wanted, abs=1e-6)
    weight = 0.568573
    constant = revised_side(side, GOLD, weight=weight).log.exp()
    assert constant.tolist() == pytest.approx(wanted, abs=1e-6)
    value = sum(p * math.log(p / q) for p, q in zip(wanted, Z_S.softmax(-1).tolist()))
    assert label_revision(Z_S, Z_T, target_ids=GOLD).item() == pytest.approx(value, abs=1e-5)


def test_fixture_1_temperature_uncertainty_and_gradients():
    assert forward_kl(Z_S, Z_T, temperature=2.0).item() == pytest.approx(0.150497, abs=1e-6)
    assert forward_kl(Z_S, Z_T, temperature=2.0, scale_t2=True).item() == pytest.approx(
        0.601986, abs=1e-6
    )
    assert log_uncertainty(Z_T, GOLD).exp().item() == pytest.approx(0.763117, abs=1e-6)
    z = Z_S.clone().requires_grad_()
    assert gradient(forward_kl(z, Z_T), z).tolist() == pytest.approx(
        [-0.476509, 0.218171, 0.188860, 0.069478], abs=1e-6
    )
    assert gradient(reverse_kl(z, Z_T), z).tolist() == pytest.approx(
        [-0.310362, 0.066456, 0.178310, 0.065597], abs=1e-6
    )


@pytest.mark.parametrize(
    "boundary, weight, value",
    [("official", 0.166667, 0.270905), ("crossing-in-head", 0.416667, 0.275459)],
)
def test_fixture_2_the_boundary_of_the_head(boundary, weight, value):
    p, q = (
        torch.tensor(x, dtype=torch.float64).log()
        for x in ([0.4, 0.3, 0.2, 0.1], [0.5, 0.15, 0.05, 0.3])
    )
    assert head_weight(q, p, boundary=boundary).item() == pytest.approx(weight, abs=1e-6)
    assert adaptive_kl(q, p, boundary=boundary).item() == pytest.approx(value, abs=1e-6)
    assert (forward_kl(q, p).item(), reverse_kl(q, p).item()) == pytest.approx(
        (0.286084, 0.267869), abs=1e-6
    )


def by_hand(name, p, q, o, g):
    "The definition of each divergence for one position, in plain python numbers."
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b))  # noqa: E731
    mix = lambda w, a, b: [w * x + (1 - w) * y for x, y in zip(a, b)]  # noqa: E731
    chernoff = lambda a: sum(x**a * y ** (1 - a) for x, y in zip(p, q))  # noqa: E731
    beta, alpha = o.get("beta", 0.5), o.get("alpha", 0.1)
    if name == "jsd" and beta == 0:
        return kl(p, q)
    if name == "jsd":
        m = mix(beta, p, q)
        value = beta * kl(p, m) + (1 - beta) * kl(q, m)
        return value / (beta * (1 - beta)) if o.get("scaled") else value
    if name == "adaptive_kl":
        ranked = sorted(range(len(p)), key=lambda j: -p[j])
        head, total = [], 0.0
        for j in ranked:
            inside = total + p[j] <= o.get("mu", 0.5) if "boundary" not in o else total < o["mu"]
            head += [j] * (inside or not head)
            total += p[j]
        gaps = [abs(x - y) for x, y in zip(p, q)]
        w = sum(gaps[j] for j in head) / sum(gaps)
        w = 1 - w if o.get("flipped") else w
        return w * kl(p, q) + (1 - w) * kl(q, p)
    if name == "dkd":
        rest = lambda a: [x / (1 - a[g]) for j, x in enumerate(a) if j != g]  # noqa: E731
        return o.get("alpha", 1) * kl((p[g], 1 - p[g]), (q[g], 1 - q[g])) + o.get("beta", 8) * kl(
            rest(p), rest(q)
        )
    if name == "label_revision":
        power = lambda x, a: [y**a / sum(z**a for z in x) for y in x]  # noqa: E731
        sharp = power(p, o.get("sharpen", 1.0))
        weight = o.get("weight", o.get("eta", 0.8) / (max(sharp) - sharp[g] + 1))
        if o.get("who") == "wrong" and max(sharp) == sharp[g]:
            weight = 1.0
        revised = mix(weight, sharp, [float(j == g) for j in range(len(p))])
        return kl(power(revised, 1 / o.get("sharpen", 1.0)), q)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "symmetric_kl": lambda: (
            o.get("weight", 0.5) * kl(p, q) + (1 - o.get("weight", 0.5)) * kl(q, p)
        ),
        "cross_entropy": lambda: -sum(x * math.log(y) for x, y in zip(p, q)),
        "skew_kl": lambda: kl(p, mix(alpha, p, q)),
        "skew_reverse_kl": lambda: kl(q, mix(alpha, q, p)),
        "total_variation": lambda: sum(abs(x - y) for x, y in zip(p, q)) / 2,
        "alpha_divergence": lambda: (
            (1 - chernoff(o.get("alpha", 0.5))) / (o.get("alpha", 0.5) * (1 - o.get("alpha", 0.5)))
        ),
        "renyi": lambda: math.log(chernoff(o.get("alpha", 0.5))) / (o.get("alpha", 0.5) - 1),
        "uld": lambda: sum(abs(x - y) for x, y in zip(sorted(p), sorted(q))),
    }[name]()


@pytest.mark.parametrize(
    "name, options",
    [v for v in VARIANTS if v[0] != "atkd"],
    ids=[i for i in IDS if not i.startswith("atkd")],
)  # see below
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_the_definition_written_out(name, options, temperature):
    student, teacher, ids = batch(seed=3)
    values = token_divergence(name, student, teacher, temperature, **with_gold(name, options, ids))
    p, q = ((x / temperature).softmax(-1).reshape(-1, 7).tolist() for x in (teacher, student))
    expected = [by_hand(name, *row, options, g) for *row, g in zip(p, q, ids.flatten().tolist())]
    assert values.flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@every
def test_gradients_by_finite_differences(name, options):
    student, teacher, ids = batch(rows=1, length=3, vocabulary=4)
    options = with_gold(name, options, ids)
    student.requires_grad_()
    if name == "adaptive_kl":  # its weight is a constant to the gradient
        w = head_weight(student, teacher, **{k: v for k, v in options.items() if k != "flipped"})
        w = 1 - w if options.get("flipped") else w
        values = token_divergence(name, student, teacher, **options).sum()
        parts = (
            w * token_divergence("forward_kl", student, teacher)
            + (1 - w) * token_divergence("reverse_kl", student, teacher)
        ).sum()
        assert torch.allclose(values, parts) and torch.allclose(
            gradient(values, student), gradient(parts, student)
        )
        return
    mask = torch.tensor([[1, 0, 1]])
    loss = get_divergence(name, **options)
    assert torch.autograd.gradcheck(
        lambda z: loss(z, teacher, mask, 1.3, scale_t2=True, denominator=7), [student]
    )


# --- edges ------------------------------------------------------------------------------------------------------------------------


def edge_cases():
    student, teacher, ids = batch(rows=2, vocabulary=6, seed=5)
    one_hot = torch.zeros_like(teacher).scatter(-1, ids.unsqueeze(-1), 120.0)
    ban = torch.tensor([0.0, 0, 0, -math.inf, 0, -math.inf], dtype=torch.float64)
    safe = torch.tensor([0, 1, 2, 4])[ids % 4]
    return {
        "T=0.05": (student, teacher, 0.05, ids),
        "one-hot teacher": (student, one_hot, 1.0, ids),
        "one-hot both": (one_hot, one_hot, 1.0, ids),
        "one-hot, T=0.05": (student, one_hot, 0.05, ids),
        "equal": (teacher, teacher, 1.0, ids),
        "equal, T=0.05": (teacher, teacher, 0.05, ids),
        "shared -inf": (student + ban, teacher + ban, 1.0, safe),
        "shared -inf, T=0.05": (student + ban, teacher + ban, 0.05, safe),
        "finfo.min as -inf": (
            student.clamp(max=0).masked_fill(ban < 0, torch.finfo(torch.float32).min),
            teacher.masked_fill(ban < 0, torch.finfo(torch.float32).min),
            0.05,
            safe,
        ),
        "far apart": (1e4 * student, -1e4 * student, 1.0, ids),
        "far apart, T=0.05": (3e4 * student.sign(), -3e4 * student.sign(), 0.05, ids),
    }


@every
@pytest.mark.parametrize("edge", edge_cases())
def test_finite_value_and_gradient_at_the_edges(name, options, edge):
    student, teacher, temperature, ids = edge_cases()[edge]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        s, t = (
            x.clamp(-largest, largest).to(dtype) if x.isfinite().all() else x.to(dtype)
            for x in (student, teacher)
        )
        if "finfo" in edge and dtype == torch.float16:
            continue  # that constant is an ordinary number there
        z = s.clone().requires_grad_()
        values = token_divergence(name, z, t, temperature, **with_gold(name, options, ids))
        slope = gradient(values.sum(), z)
        assert values.isfinite().all() and (values > -1e-5).all() and slope.isfinite().all(), dtype
        if "equal" in edge and name not in ("cross_entropy", "label_revision"):
            assert values.abs().max() < 1e-5 and slope.abs().max() < 1e-4, dtype


@every
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_token_that_only_one_side_bans(name, options, who):
    "Never NaN: +inf where the definition has it (with zero gradient), otherwise finite."
    student, teacher, _ = batch()
    ids = torch.zeros(3, 4, dtype=torch.long)
    ban = torch.tensor([0.0, 0, 0, 0, 0, 0, -math.inf], dtype=torch.float64)
    student, teacher = (student, teacher + ban) if who == "teacher" else (student + ban, teacher)
    z = student.clone().requires_grad_()
    values = token_divergence(name, z, teacher, **with_gold(name, options, ids))
    slope = gradient(values.sum(), z)
    assert not values.isnan().any() and slope.isfinite().all()
    p, q = teacher.softmax(-1), student.softmax(-1)
    forward, reverse = (bool(((a > 0) & (b == 0)).any()) for a, b in ((p, q), (q, p)))
    infinite = {
        "forward_kl": forward,
        "cross_entropy": forward,
        "reverse_kl": reverse,
        "symmetric_kl": True,
        "adaptive_kl": True,
        "dkd": forward,
        "atkd": reverse if options.get("reverse") else forward,
        "label_revision": forward,
        "renyi": forward and options.get("alpha", 0.5) > 1,
    }.get(name, False)
    if options == {"beta": 0.0, "scaled": True}:
        infinite = forward
    assert values.isinf().all() == values.isinf().any() == infinite and (values > 0).all()
    if (
        name not in NEEDS_GOLD
    ):  # these may be infinite in one of their two parts and finite in the other
        assert slope.any() != infinite


def test_a_floor_makes_it_finite_and_still_teaches():
    student, teacher, _ = batch()
    teacher[..., 6] = -math.inf
    for name in ("reverse_kl", "symmetric_kl", "adaptive_kl"):
        z = student.clone().requires_grad_()
        values = token_divergence(name, z, teacher, floor=-20.0)
        slope = gradient(values.sum(), z)
        assert values.isfinite().all() and (slope[..., 6] > 0).all(), name
    q = student.softmax(-1)
    by_floor = (q[..., :6] * (q[..., :6].log() - teacher.log_softmax(-1)[..., :6])).sum(-1) + q[
        ..., 6
    ] * (q[..., 6].log() + 20.0)
    assert torch.allclose(token_divergence("reverse_kl", student, teacher, floor=-20.0), by_floor)
    assert (
        forward_kl(teacher, student) == math.inf
        and cross_entropy(teacher, student, floor=-20.0) < 20.0
    )


def test_a_weight_of_zero_silences_infinity():
    student, teacher, ids = batch()
    teacher[..., 6] = -math.inf
    assert torch.isclose(symmetric_kl(student, teacher, weight=1.0), forward_kl(student, teacher))
    assert dkd(student, teacher, target_ids=ids % 6, alpha=1.0, beta=0.0).isfinite()


def test_no_position_may_ban_everything():
    with pytest.raises(UserError, match="every logit of a position is -inf"):
        forward_kl(torch.zeros(2, 3), torch.full((2, 3), -math.inf))


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    st.sampled_from([0.05, 0.5, 1.0, 4.0]),
)
@settings(max_examples=12, deadline=None)
def test_never_nan_whatever_the_logits(numbers, temperature):
    z, teacher = torch.tensor(numbers[:4]).requires_grad_(), torch.tensor(numbers[4:])
    for name, options in VARIANTS:
        value = token_divergence(
            name, z, teacher, temperature, **with_gold(name, options, torch.tensor(2))
        )
        assert value.isfinite() and gradient(value, z).isfinite().all(), name


# --- bounds, limits, identities ---------------------------------------------------------------------------------------------------

logits_pair = st.integers(0, 10_000).map(
    lambda seed: batch(rows=1, length=5, vocabulary=6, seed=seed, scale=1 + seed % 7)
)


@given(logits_pair, st.floats(0.01, 0.99))
@settings(max_examples=10, deadline=None)
def test_bounds(pair, w):
    s, t, _ = pair
    v = partial(token_divergence, student_logits=s, teacher_logits=t)
    fkl, rkl, tv = v("forward_kl"), v("reverse_kl"), v("total_variation")
    binary = -w * math.log(w) - (1 - w) * math.log(1 - w)
    eps = 1e-10
    assert (v("jsd", beta=w) <= binary + eps).all() and (
        v("skew_kl", alpha=w) <= -math.log(w) + eps
    ).all()
    assert (v("skew_reverse_kl", alpha=w) <= -math.log(w) + eps).all() and (
        v("alpha_divergence", alpha=w) <= 1 / (w * (1 - w)) + eps
    ).all()
    assert (
        (tv <= 1 + eps).all()
        and (tv <= (torch.minimum(fkl, rkl) / 2).sqrt() + eps).all()
        and (v("uld") <= 2 * tv + eps).all()
    )
    assert torch.allclose(v("jsd", beta=w), token_divergence("jsd", t, s, beta=1 - w))
    assert (v("skew_kl", alpha=w) <= fkl + eps).all() and (v("renyi", alpha=w) <= fkl + eps).all()
    for name, options in VARIANTS:
        if name not in NEEDS_GOLD:
            assert (v(name, **options) >= -eps).all(), name


def test_limits_meet_the_kls():
    s, t, _ = batch(scale=0.7)
    v = partial(token_divergence, student_logits=s, teacher_logits=t)
    fkl, rkl = v("forward_kl"), v("reverse_kl")
    near = dict(rtol=1e-3)
    assert torch.allclose(v("jsd", beta=1e-5) / 1e-5, fkl, **near) and torch.allclose(
        v("jsd", beta=1 - 1e-5) / 1e-5, rkl, **near
    )
    for beta, end in ((0.0, fkl), (1e-5, fkl), (1 - 1e-5, rkl), (1.0, rkl)):
        assert torch.allclose(v("jsd", beta=beta, scaled=True), end, **near)
    assert torch.equal(v("skew_kl", alpha=0.0), fkl) and torch.equal(
        v("skew_reverse_kl", alpha=0.0), rkl
    )
    assert (
        v("skew_kl", alpha=1.0).abs().max() < 1e-12
        and v("skew_reverse_kl", alpha=1.0).abs().max() < 1e-12
    )
    for alpha, end in ((1.0, fkl), (1 - 1e-4, fkl), (0.0, rkl), (1e-4, rkl)):
        assert torch.allclose(v("alpha_divergence", alpha=alpha), end, rtol=2e-3)
    for alpha in (1.0, 1 - 1e-4, 1 + 1e-4):
        assert torch.allclose(v("renyi", alpha=alpha), fkl, rtol=2e-3)
    assert torch.allclose(v("adaptive_kl", mu=1.0), fkl)


def test_unscaled_jsd_is_zero_at_its_ends_and_says_so():
    s, t, _ = batch()
    for beta in (0.0, 1.0):
        with pytest.warns(UserWarning, match="0 for every student"):
            assert jsd(s, t, beta=beta).abs() < 1e-12


def test_alpha_divergence_overflows_to_infinity_not_to_nan():
    z = torch.tensor([200.0, 0.0], requires_grad=True)
    value = alpha_divergence(z, torch.tensor([0.0, 200.0]), alpha=2.0)
    assert value == math.inf and not gradient(value, z).any()
    assert renyi(z, torch.tensor([0.0, 200.0]), alpha=2.0).isfinite()


def test_float32_is_close_to_float64_near_the_teacher():
    s, t, ids = batch(rows=8, vocabulary=1000, scale=3.0)
    s = t + 0.01 * s
    for name, options in VARIANTS:
        options = with_gold(name, options, ids)
        exact, single = (
            token_divergence(name, s.to(d), t.to(d), **options)
            for d in (torch.float64, torch.float32)
        )
        assert (single - exact).abs().max() < 3e-6 * max(1, exact.abs().max()), name


@given(logits_pair)
@settings(max_examples=30, deadline=None)
def test_kl_is_its_two_questions(pair):
    s, t, ids = pair
    tkd, rest = (
        token_divergence("dkd", s, t, target_ids=ids, alpha=a, beta=1 - a) for a in (1.0, 0.0)
    )
    assert torch.allclose(
        tkd + log_uncertainty(t, ids).exp() * rest, token_divergence("forward_kl", s, t)
    )


# --- masks and denominators -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.lists(st.integers(1, 3), min_size=1, max_size=4))
@settings(max_examples=8, deadline=None)
def test_any_cut_into_micro_batches_gives_the_same_loss_and_gradient(seed, sizes):
    student, teacher, ids = batch(rows=sum(sizes), seed=seed)
    mask = torch.rand(sum(sizes), 4, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0, 0] = True
    split = easy_hard(log_uncertainty(teacher, ids)[mask])
    pieces = list(zip(*(x.split(sizes) for x in (student, teacher, mask, ids))))
    denominator = effective_denominator(*mask.split(sizes))
    for name in ("forward_kl", "jsd", "adaptive_kl", "atkd"):
        options = {"split": split} if name == "atkd" else {}
        z = student.clone().requires_grad_()
        whole = get_divergence(name)(z, teacher, mask, **with_gold(name, {}, ids))
        parts = [
            get_divergence(name, **options)(
                a, b, m, denominator=denominator, **with_gold(name, {}, i)
            )
            for a, (_, b, m, i) in zip(z.split(sizes), pieces)
        ]
        assert torch.isclose(whole, sum(parts)) and torch.allclose(
            gradient(whole, z), gradient(sum(parts), z)
        )


def test_a_micro_batch_without_target_tokens_counts_zero_if_there_is_a_denominator():
    student, teacher, ids = batch()
    student.requires_grad_()
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    for name, options in VARIANTS:
        loss = get_divergence(name, **options)(
            student, teacher, nothing, denominator=12, **with_gold(name, {}, ids)
        )
        assert loss == 0 and not gradient(loss, student).any()
        with pytest.raises(UserError, match="no unmasked position"):
            get_divergence(name, **options)(student, teacher, nothing, **with_gold(name, {}, ids))


def test_masks_of_other_kinds():
    student, teacher, _ = batch()
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]])
    expected = token_divergence("forward_kl", student, teacher)[mask.bool()].mean()
    for m in (mask, mask.bool(), mask.float()):
        assert torch.isclose(forward_kl(student, teacher, m), expected)
    assert torch.isclose(forward_kl(student, teacher, mask, denominator=torch.tensor(8)), expected)
    with pytest.raises(UserError, match="other numbers than 0 and 1"):
        forward_kl(student, teacher, mask * 0.5)
    with pytest.raises(UserError, match=r"mask has shape \(3, 5\)"):
        forward_kl(student, teacher, torch.ones(3, 5))
    for bad in (0, -1, torch.tensor(0)):
        with pytest.raises(UserError, match="denominator"):
            forward_kl(student, teacher, denominator=bad)


WORKER = """
    import gc, sys, torch, torch.distributed as dist
    from kd_notes.losses.divergences import effective_denominator, reverse_kl
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    torch.manual_seed(0)
    head, hidden, teacher = torch.nn.Linear(6, 9), torch.randn(4, 3, 6), torch.randn(4, 3, 9)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0]])
    model = torch.nn.parallel.DistributedDataParallel(head)
    mine = [2*rank, 2*rank + 1]                      # two micro-batches of one row on each process; 5 tokens here, 2 there
    denominator = effective_denominator(*(mask[i] for i in mine))
    assert denominator == 3.5
    for i in mine:
        with model.no_sync() if i == mine[0] else torch.enable_grad():
            reverse_kl(model(hidden[i]), teacher[i], mask[i], denominator=denominator).backward()
    got = head.weight.grad.clone()
    head.zero_grad()
    reverse_kl(head(hidden), teacher, mask).backward()
    assert torch.allclose(got, head.weight.grad, atol=1e-6), (got - head.weight.grad).abs().max()
    del model
    gc.collect()                                     # DistributedDataParallel lies in a cycle and holds the group: while it lives, a
    dist.destroy_process_group()                     # thread of gloo's may free its last work after Python's end, which aborts
"""


def test_two_processes_with_two_micro_batches_each_equal_one_batch(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(textwrap.dedent(WORKER))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(tmp_path / "meet")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [run.communicate(timeout=200)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(errors)


# --- temperature ------------------------------------------------------------------------------------------------------------------


def test_t2_only_on_request_and_the_high_temperature_limit():
    student, teacher, _ = batch()
    plain, scaled = (
        forward_kl(student, teacher, temperature=4.0),
        forward_kl(student, teacher, temperature=4.0, scale_t2=True),
    )
    assert torch.isclose(16 * plain, scaled) and torch.isclose(
        plain, forward_kl(student / 4, teacher / 4)
    )
    z = student.clone().requires_grad_()
    slope = gradient(forward_kl(z, teacher, temperature=1000.0, scale_t2=True, denominator=1), z)
    centred = (student - teacher) - (student - teacher).mean(-1, keepdim=True)
    assert torch.allclose(slope, centred / 7, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("bad", [0, -1.0, math.inf, math.nan, "warm"])
def test_a_temperature_must_be_positive(bad):
    with pytest.raises(UserError, match="temperature"):
        forward_kl(Z_S, Z_T, temperature=bad)


# --- AKL --------------------------------------------------------------------------------------------------------------------------


@given(logits_pair)
@settings(max_examples=30, deadline=None)
def test_akl_weights(pair):
    s, t, _ = pair
    w = head_weight(s, t)
    assert ((0 <= w) & (w <= 1)).all()
    sure = t.softmax(-1).amax(-1) > 0.5
    assert (w[sure] <= 0.5 + 1e-9).all()
    p, q = t.softmax(-1), s.softmax(-1)
    only_top = (p - q).abs().gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1) / (p - q).abs().sum(
        -1
    )
    assert (
        torch.allclose(head_weight(s, t, mu=1e-9), only_top)
        and (head_weight(s, t, mu=1.0) == 1).all()
    )


def test_akl_at_agreement_and_for_one_hot_teachers():
    _, t, ids = batch()
    s = t.clone()
    assert (head_weight(s, t) == 0.5).all() and (token_divergence("adaptive_kl", s, t) == 0).all()
    one_hot = torch.full_like(t, -math.inf).scatter(-1, ids.unsqueeze(-1), 0.0)
    assert torch.allclose(head_weight(s, one_hot), torch.full((3, 4), 0.5, dtype=torch.float64))


def test_akl_is_pure_where_the_error_is_on_one_side_only():
    p = torch.tensor([0.3, 0.2, 0.25, 0.15, 0.1], dtype=torch.float64)
    head, tail = p.clone(), p.clone()
    head[[0, 1]] += torch.tensor([0.05, -0.05])
    tail[[3, 4]] += torch.tensor([0.05, -0.05])
    mu = 0.8  # tokens 0, 2, 1: 0.75
    assert head_weight(head.log(), p.log(), mu=mu) == pytest.approx(1.0) and head_weight(
        tail.log(), p.log(), mu=mu
    ) == pytest.approx(0.0)


def test_akl_tied_tokens_share_the_head():
    "A flat teacher over ten tokens: five are inside. The gap is on one token, so the weight is the chance that it is inside."
    q = torch.full((10,), 0.09, dtype=torch.float64)
    for j in range(10):
        student = q.clone()
        student[j] = 0.19
        expected = (0.09 * 0.5 + 9 * 0.01 * 0.5) / (0.09 + 9 * 0.01)
        assert head_weight(student.log(), torch.zeros(10, dtype=torch.float64)) == pytest.approx(
            expected
        )


def test_akl_head_of_a_flat_teacher_needs_more_than_one_round():
    "1,000 slightly different probabilities: the head has about 500 tokens, more than the first 64 that are looked at."
    t = torch.linspace(0, 0.1, 1000, dtype=torch.float64)
    peaked = torch.cat(
        [torch.tensor([9.0], dtype=torch.float64), torch.zeros(999, dtype=torch.float64)]
    )
    s = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for boundary in ("official", "crossing-in-head"):
        got = head_weight(s, torch.stack([t, peaked]), boundary=boundary)
        for row, teacher in enumerate((t, peaked)):
            p, q = teacher.softmax(-1), s[row].softmax(-1)
            order = p.argsort(descending=True)
            after = p[order].cumsum(0)
            inside = after <= 0.5 if boundary == "official" else after - p[order] < 0.5
            inside[0] = True
            gap = (p - q).abs()[order]
            assert got[row] == pytest.approx((gap[inside].sum() / gap.sum()).item(), rel=1e-9)


@pytest.mark.parametrize("boundary", ["official", "crossing-in-head"])
def test_akl_is_the_fixed_mean_where_each_group_errs_one_way(boundary):
    "The errors of a position sum to 0, so equal signs in each group make both gaps equal."
    p = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64)
    inside = 1 if boundary == "official" else 2
    q = p.clone()
    q[:inside] -= 0.09 / inside
    q[inside:] += 0.09 / (5 - inside)
    z = q.log().requires_grad_()
    ours, mean = adaptive_kl(z, p.log(), boundary=boundary), symmetric_kl(z, p.log())
    assert head_weight(z, p.log(), boundary=boundary).item() == pytest.approx(0.5, abs=1e-12)
    assert torch.isclose(ours, mean) and torch.allclose(gradient(ours, z), gradient(mean, z))
    # One error of the other sign in the tail, and it is the mean no more.
    q[4] -= 0.05
    q[inside] += 0.05
    assert head_weight(q.log(), p.log(), boundary=boundary) < 0.49


def test_akl_at_the_ends_is_one_of_the_two_kls():
    student, teacher, _ = batch()
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    assert torch.equal(adaptive_kl(student, teacher, mu=1.0), forward)
    assert torch.equal(adaptive_kl(student, teacher, mu=1.0, flipped=True), reverse)
    # The weights of a position sum to 1: with both orders every KL is counted once.
    both = adaptive_kl(student, teacher) + adaptive_kl(student, teacher, flipped=True)
    assert torch.isclose(both, forward + reverse)


def test_akl_values_where_the_error_is_on_one_side_only():
    p = torch.tensor([0.3, 0.2, 0.25, 0.15, 0.1], dtype=torch.float64)
    shift = torch.tensor([0.05, -0.05])
    head, tail = p.index_add(0, torch.tensor([0, 1]), shift.double()), p.clone()
    tail[3:] += shift
    in_head, in_tail, teacher = head.log(), tail.log(), p.log()
    mine = partial(adaptive_kl, teacher_logits=teacher, mu=0.8)
    assert torch.isclose(mine(in_head), forward_kl(in_head, teacher))
    assert torch.isclose(mine(in_tail), reverse_kl(in_tail, teacher))
    assert torch.isclose(mine(in_tail), (tail[3:] * (tail[3:] / p[3:]).log()).sum())


def test_akl_boundaries_agree_exactly_where_a_prefix_holds_the_mass():
    student, _, _ = batch(vocabulary=4)
    for p, same in (([0.25, 0.5, 0.125, 0.125], True), ([0.25, 0.4375, 0.1875, 0.125], False)):
        teacher = torch.tensor(p, dtype=torch.float64).log().expand(3, 4, 4)
        weights = [
            head_weight(student, teacher, boundary=b) for b in ("official", "crossing-in-head")
        ]
        # Of every row: the token that crosses moves its gap from the tail to the head.
        moved = weights[1] - weights[0]
        assert torch.allclose(*weights) if same else (moved > 1e-3).all()


def test_akl_gives_a_banned_token_no_weight():
    "The released code replaces an infinite logit by 0 before its softmax."
    student, teacher, _ = batch()
    banned = torch.full((3, 4, 1), -math.inf, dtype=torch.float64)
    wide = [torch.cat([x, banned], -1) for x in (student, teacher)]
    assert torch.allclose(head_weight(*wide), head_weight(student, teacher))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "adaptive_kl"])
def test_free_logits_reach_the_teacher(name):
    "The toys of the AKL paper's notebooks: mixtures of two Gaussians over 50 bins, a long tail over 80."
    x = torch.linspace(-5, 5, 50, dtype=torch.float64)
    bell = lambda centre, width: torch.exp(-0.5 * ((x - centre) / width) ** 2)  # noqa: E731
    tail = torch.exp(-0.5 * (torch.arange(80, dtype=torch.float64) * 1.25 / 16) ** 2)
    toys = [(0.25 * bell(-2, 0.7) + 0.75 * bell(2, 0.9), 0.1, 200), (tail, 0.2, 300)]
    for density, lr, steps in toys:
        teacher = (density / density.sum()).log()
        start = torch.rand(len(density), dtype=torch.float64, generator=torch.manual_seed(0))
        z = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([z], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            token_divergence(name, z, teacher).backward()
            optimizer.step()
        off = [(each.softmax(-1) - teacher.exp()).abs().sum() for each in (z, start)]
        assert off[0] < 0.05 < 0.2 < off[1]


# --- ATKD -------------------------------------------------------------------------------------------------------------------------


def test_atkd_written_out():
    student, teacher, ids = batch()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    p, q = teacher.softmax(-1)[mask], student.softmax(-1)[mask]
    easy, hard = [], []
    uncertain = 1 - p.gather(-1, ids[mask].unsqueeze(-1)).squeeze(-1)
    for row in range(len(p)):
        tkd, rest = (
            by_hand(
                "dkd",
                p[row].tolist(),
                q[row].tolist(),
                {"alpha": a, "beta": 1 - a},
                ids[mask][row].item(),
            )
            for a in (1, 0)
        )
        (easy if uncertain[row] < uncertain.median() else hard).append(
            rest if uncertain[row] < uncertain.median() else tkd + rest
        )
    expected = 0.2 * sum(easy) / len(easy) + 0.8 * sum(hard) / len(hard)
    assert atkd(student, teacher, mask, target_ids=ids).item() == pytest.approx(expected, rel=1e-9)
    cut = easy_hard(log_uncertainty(teacher, ids)[mask])
    assert (
        (cut.easy, cut.hard) == (len(easy), len(hard))
        and cut.hard >= cut.easy
        and cut.easy + cut.hard == mask.sum()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_a_cut_holds_for_positions_that_are_rounded_differently(n, dtype):
    u = -torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=dtype)
    for fraction in (0.0, 0.3, 0.5, 1.0):
        split = easy_hard(u, fraction)
        for side in (-math.inf, math.inf):
            moved = torch.nextafter(u, torch.full_like(u, side))
            assert int((moved < split.threshold).sum()) == split.easy
    neighbours = torch.stack([u[0], torch.nextafter(u[0], torch.ones_like(u[0]))])
    split = easy_hard(neighbours, 0.5)
    assert int((neighbours < split.threshold).sum()) == split.easy


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_easy_hard_follows_torch_median_and_ties_are_hard(n):
    u = torch.randn(n, generator=torch.Generator().manual_seed(n))
    assert (
        easy_hard(u).easy == (u < u.median()).sum()
        and easy_hard(u, 1.0).easy == 0
        and easy_hard(u, 0.0).hard == 0
    )
    assert easy_hard(torch.zeros(n)) == (-math.inf, 0, n)
    with pytest.raises(UserError, match="no positions"):
        easy_hard(torch.zeros(0))


def test_atkd_without_a_split_is_the_kl_of_its_parts():
    student, teacher, ids = batch()
    everything_hard = atkd(student, teacher, target_ids=ids, hard_fraction=1.0, easy_weight=0.0)
    assert torch.isclose(
        everything_hard, dkd(student, teacher, target_ids=ids, alpha=1.0, beta=1.0)
    )
    assert torch.isclose(
        atkd(student, teacher, target_ids=ids, hard_fraction=0.0, easy_weight=1.0),
        dkd(student, teacher, target_ids=ids, alpha=0.0, beta=1.0),
    )


def parts_at(student, teacher, ids, mask):
    "Target part, non-target part and uncertainty of the unmasked positions."
    tkd, rest = (
        token_divergence("dkd", student, teacher, target_ids=ids, alpha=a, beta=1 - a)[mask]
        for a in (1.0, 0.0)
    )
    return tkd, rest, log_uncertainty(teacher, ids).exp()[mask]


def test_atkd_with_its_factor_kept_and_equal_groups_is_half_of_two_kls():
    "KL = TKD + (1 - p_g) DKD at every position, so with lambda = 0.5 the groups' means give the KL."
    student, teacher, ids = batch()
    mask = torch.ones(3, 4, dtype=torch.bool)
    tkd, rest, unsure = parts_at(student, teacher, ids, mask)
    kl = tkd + unsure * rest
    assert torch.allclose(kl, token_divergence("forward_kl", student, teacher)[mask])
    cut = easy_hard(unsure.log())
    hard = unsure.log() >= cut.threshold
    grouped = 0.5 * kl[~hard].mean() + 0.5 * kl[hard].mean()
    sizes = torch.where(hard, len(kl) / (2 * cut.hard), len(kl) / (2 * cut.easy))
    assert torch.isclose(grouped, (sizes * kl).mean())
    assert (cut.easy, cut.hard) == (5, 7) and not torch.isclose(grouped, kl.mean())
    even = torch.randperm(12, generator=torch.Generator().manual_seed(0)) < 6
    assert torch.isclose(0.5 * kl[~even].mean() + 0.5 * kl[even].mean(), kl.mean())


@pytest.mark.parametrize("reverse", [False, True])
def test_atkd_parts_vanish_where_the_models_agree_about_them(reverse):
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    same_gold = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)
    same_rest = torch.tensor([0.8, 0.12, 0.08], dtype=torch.float64)
    ids = torch.zeros((), dtype=torch.long)
    both = partial(atkd, teacher_logits=p.log(), target_ids=ids, reverse=reverse)
    easy, hard = {"hard_fraction": 0.0, "easy_weight": 1.0}, {"hard_fraction": 1.0}
    pair = (p, same_rest) if not reverse else (same_rest, p)
    binary = sum(a * (a / b).log() for a, b in zip(*([x[0], 1 - x[0]] for x in pair)))
    assert both(same_rest.log(), **easy).abs() < 1e-12  # only DKD counts there
    assert torch.isclose(both(same_rest.log(), **hard), 0.8 * binary)  # TKD is left
    assert torch.isclose(both(same_gold.log(), **easy), both(same_gold.log(), **hard) / 0.8)


@pytest.mark.parametrize("sure", ["teacher", "student"])
@pytest.mark.parametrize("reverse", [False, True])
def test_atkd_of_a_model_that_allows_only_the_gold_token(sure, reverse):
    _, logits, ids = batch()
    delta = torch.full_like(logits, -math.inf).scatter(-1, ids.unsqueeze(-1), 0.0)
    student, teacher = (logits, delta) if sure == "teacher" else (delta, logits)
    z = student.clone().requires_grad_()
    values = token_divergence("atkd", z, teacher, target_ids=ids, reverse=reverse)
    assert not values.isnan().any() and gradient(values.sum(), z).isfinite().all()
    if (sure == "teacher") != reverse:  # the side in front: nothing to rank, and TKD = -log
        gold = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(values, -0.8 * gold)  # its uncertainty is 0 everywhere: ties are hard
    else:
        assert values.isinf().all()


def test_reverse_atkd_swaps_the_roles_and_ranks_by_the_student():
    student, teacher, ids = batch()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    tkd, rest, unsure = parts_at(teacher, student, ids, mask)  # of KL(q || p)
    assert torch.allclose(
        tkd + unsure * rest, token_divergence("reverse_kl", student, teacher)[mask]
    )
    hard = unsure >= unsure.median()
    expected = 0.2 * rest[~hard].mean() + 0.8 * (tkd + rest)[hard].mean()
    z, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    ours = atkd(z, t, mask, target_ids=ids, reverse=True)
    assert torch.isclose(ours, expected)
    ours.backward()
    assert t.grad is None and z.grad[mask].any() and not z.grad[~mask].any()
    cut = easy_hard(log_uncertainty(student, ids)[mask])
    assert torch.isclose(
        atkd(student, teacher, mask, target_ids=ids, reverse=True, split=cut), ours
    )
    assert not torch.isclose(atkd(student, teacher, mask, target_ids=ids), ours)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (1, 1, 7), (1, 3, 7)])
def test_atkd_of_one_row_or_one_position_keeps_its_shape_and_its_inputs(shape):
    "The released code squeezes, and masks its loss in place."
    student, teacher, ids = (x.flatten(0, 1) for x in batch())
    student, teacher = (x[: math.prod(shape[:-1])].reshape(shape) for x in (student, teacher))
    ids = ids[: math.prod(shape[:-1])].reshape(shape[:-1])
    before = student.clone(), teacher.clone(), ids.clone()
    values = token_divergence("atkd", student, teacher, target_ids=ids)
    assert values.shape == shape[:-1]
    for now, then in zip((student, teacher, ids), before):
        assert torch.equal(now, then)
    twice = [torch.stack([x, x]) for x in (student, teacher, ids)]
    repeated = atkd(*twice[:2], target_ids=twice[2])
    assert torch.isclose(repeated, atkd(student, teacher, target_ids=ids))


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_moves_no_position_across_the_cut(reverse):
    student, teacher, ids = batch(rows=1, length=8)
    plain = atkd(student, teacher, target_ids=ids, reverse=reverse)
    mask = torch.tensor([[1] * 8 + [0] * 9])
    for sure in (30.0, -30.0):  # padding about which the model is sure, or unsure
        pads = torch.zeros(1, 9, 7, dtype=torch.float64).index_fill(-1, torch.tensor(0), sure)
        wide = [torch.cat([x, pads], 1) for x in (student, teacher)]
        padded = atkd(*wide, mask, target_ids=F.pad(ids, (0, 9), value=0), reverse=reverse)
        assert torch.isclose(padded, plain)


def test_targets_are_checked():
    student, teacher, ids = batch()
    with pytest.raises(UserError, match="-100"):
        dkd(student, teacher, target_ids=ids.masked_fill(ids == ids[0, 0], -100))
    with pytest.raises(UserError, match=r"target_ids has shape \(3,\)"):
        dkd(student, teacher, target_ids=ids[:, 0])
    with pytest.raises(UserError, match="atkd needs target_ids"):
        get_divergence("atkd")(student, teacher)


def test_dkd_of_sure_models_keeps_its_digits():
    "1 - q_g is 1e-13, far below what float32 could take from 1."
    student, teacher = torch.tensor([30.0, 0.0, 1.0, 0.0]), torch.tensor([28.0, 0.0, 0.0, 2.0])
    single, double = (
        token_divergence("dkd", student.to(d), teacher.to(d), target_ids=torch.tensor(0))
        for d in (torch.float32, torch.float64)
    )
    assert single.item() == pytest.approx(double.item(), rel=1e-5)


# --- the registry -----------------------------------------------------------------------------------------------------------------


def test_the_scalar_functions_and_the_registry_agree():
    student, teacher, ids = batch()
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]])
    functions = {
        f.__name__: f
        for f in (
            forward_kl,
            reverse_kl,
            jsd,
            symmetric_kl,
            skew_kl,
            skew_reverse_kl,
            total_variation,
            cross_entropy,
            adaptive_kl,
            atkd,
            dkd,
            uld,
            alpha_divergence,
            renyi,
            label_revision,
        )
    }
    assert set(functions) == set(DIVERGENCES)
    for name, options in VARIANTS:
        options = with_gold(name, options, ids)
        a = functions[name](student, teacher, mask, 1.7, scale_t2=True, denominator=9, **options)
        assert a == get_divergence(name, **options)(
            student, teacher, mask, 1.7, scale_t2=True, denominator=9
        ), name


def test_unknown_names_and_options():
    with pytest.raises(UserError, match="Choose one of forward_kl, reverse_kl"):
        get_divergence("kl")
    with pytest.raises(UserError, match="skew_kl has no option 'beta'. It knows: alpha"):
        get_divergence("skew_kl", beta=0.1)
    with pytest.raises(UserError, match="alpha: 1.5 is not between 0 and 1"):
        skew_kl(Z_S, Z_T, alpha=1.5)
    with pytest.raises(UserError, match="boundary"):
        adaptive_kl(Z_S, Z_T, boundary="mine")
    with pytest.raises(UserError, match="order"):
        renyi(Z_S, Z_T, alpha=0.0)
    with pytest.raises(UserError, match="the positions differ"):
        forward_kl(torch.zeros(2, 4), torch.zeros(3, 4))


def test_an_objective_of_ones_own(monkeypatch):
    monkeypatch.setitem(
        DIVERGENCES,
        "squared",
        lambda s, t, temperature=1.0, *, power=2: (
            (s.softmax(-1) - t.softmax(-1)).abs().pow(power).sum(-1)
        ),
    )
    student, teacher, _ = batch()
    assert get_divergence("squared", power=1)(student, teacher) == pytest.approx(
        2 * total_variation(student, teacher).item()
    )
    with pytest.raises(UserError, match="power"):
        get_divergence("squared", root=2)


class Count(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        big = any(isinstance(a, torch.Tensor) and a.shape[-1:] == (4096,) for a in args)
        self.seen[name] = self.seen.get(name, 0) + big
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.seen = {}
        return super().__enter__()


@every
def test_one_log_softmax_per_side_and_no_sort_without_need(name, options):
    student, teacher, ids = batch(vocabulary=4096, dtype=torch.float32, scale=4.0)
    with Count() as count:
        token_divergence(name, student, teacher, **with_gold(name, options, ids))
    assert count.seen.get("_log_softmax") == (
        4 if name in ("dkd", "atkd") or "sharpen" in options else 2
    )  # these renormalise, without the gold token or at another temperature
    assert count.seen.get("sort", 0) == (2 if name == "uld" else 0)
    assert count.seen.get("exp", 0) <= (5 if name == "adaptive_kl" else 3)


# --- vocabularies and tokenizers --------------------------------------------------------------------------------------------------


def test_align_vocabulary():
    student, teacher = torch.randn(2, 100), torch.randn(2, 104)
    a, b = align_vocabulary(student, teacher)
    assert a.shape == b.shape == (2, 100) and torch.equal(b, teacher[:, :100])
    a, b = align_vocabulary(student, teacher, size=97, how="-inf")
    assert (
        a.shape == b.shape == (2, 104)
        and (a[:, 97:] == -math.inf).all()
        and (b[:, 97:] == -math.inf).all()
    )
    for arguments, message in (
        (dict(size=101), "101 ids do not fit"),
        (dict(size=0), "do not fit"),
        (dict(how="zeros"), "zeros"),
    ):
        with pytest.raises(UserError, match=message):
            align_vocabulary(student, teacher, **arguments)
    with pytest.raises(UserError, match="more than padding"):
        align_vocabulary(student, torch.randn(2, 200))
    assert align_vocabulary(student, torch.randn(2, 200), size=90)[1].shape == (2, 90)


def word_tokenizer(folder, words, **special):
    "A fast tokenizer that knows these words and single bytes."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["</s>", *alphabet])}
    merges = []
    for word in words:
        for cut in range(1, len(word)):
            if word[: cut + 1] not in vocabulary:
                vocabulary[word[: cut + 1]] = len(vocabulary)
                merges.append((word[:cut], word[cut]))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", **special)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    return word_tokenizer(folder, ["hello", "Ġworld", "Ġwork"]), word_tokenizer(
        folder, ["hell", "Ġwor", "Ġthere"], bos_token="<s>"
    )


def test_check_tokenizers(tokenizers):
    student, teacher = tokenizers
    assert check_tokenizers(student, student) == len(student.get_vocab())
    with pytest.raises(UserError, match="aligned_span_loss.*SeqKD"):
        check_tokenizers(student, teacher)
    more = word_tokenizer(None, ["hello", "Ġworld", "Ġwork"], additional_special_tokens=["<tool>"])
    assert len(more) > len(student) and check_tokenizers(student, more) == len(
        student
    )  # what one side has on top is no conflict


def test_tokenizers_with_equal_tokens_that_cut_differently(tokenizers):
    other = word_tokenizer(None, ["hello", "Ġworld", "Ġwork"])
    from tokenizers import normalizers

    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="cut text differently"):
        check_tokenizers(tokenizers[0], other)


def test_spans_end_where_both_tokenizers_cut(tokenizers):
    text = "hello world, work 🙂 there"
    (ids_s, ends_s), (ids_t, ends_t) = (token_ends(tok, text) for tok in tokenizers)
    assert (
        len(ids_s) == len(ends_s) and ends_s[-1] == len(text) + 1 and -1 in ends_s
    )  # three of the emoji's four bytes end nowhere
    spans = align_spans(ends_s, ends_t)
    pieces = [
        (tokenizers[0].decode(ids_s[a:b]), tokenizers[1].decode(ids_t[c:d]))
        for a, b, c, d in spans[:-1]
    ]
    assert all(x == y for x, y in pieces) and "".join(x for x, _ in pieces) == text
    assert pieces[0][0] == "hello" and spans[0] == (0, 1, 0, 2)
    shifted = align_spans(
        ends_s, ends_t, 3, 5
    )  # the prompt, with a BOS on one side only, comes before
    assert shifted == [(a + 3, b + 3, c + 5, d + 5) for a, b, c, d in spans]
    assert align_spans(ends_s, ends_t[:4]) == [
        s for s in spans if s.teacher_stop <= 4
    ]  # a truncated teacher


@given(
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=12),
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=12),
)
@settings(max_examples=100, deadline=None)
def test_spans_are_the_common_cuts(a, b):
    ends = [[sum(x[: i + 1]) for i in range(len(x))] for x in (a, b)]
    spans = align_spans(*ends)
    common = sorted(set(ends[0]) & set(ends[1]))
    assert (
        [ends[0][s.student_stop - 1] for s in spans]
        == [ends[1][s.teacher_stop - 1] for s in spans]
        == common
    )
    assert all(
        x.student_stop == y.student_start and x.teacher_stop == y.teacher_start
        for x, y in zip(spans, spans[1:])
    )


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match="spans_in_order"):
        token_ends(SimpleNamespace(is_fast=False), "text")


def span_setting(seed=0, same=False):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(2, 5, 8, generator=g, dtype=torch.float64)
    teacher = torch.randn(2, 5 if same else 6, 8 if same else 11, generator=g, dtype=torch.float64)
    ids_s = torch.randint(8, (2, 5), generator=g)
    ids_t = ids_s if same else torch.randint(11, (2, 6), generator=g)
    spans = [
        [Span(0, 1, 0, 1), Span(1, 3, 1, 2), Span(3, 4, 2, 5)],
        [Span(1, 2, 0, 1), Span(2, 5, 1, 6)],
    ]
    return (
        student,
        teacher,
        ids_s,
        ids_t,
        [[Span(i, i + 1, i, i + 1) for i in range(5)]] * 2 if same else spans,
    )


@pytest.mark.parametrize("kind", ["likelihood", "matched", "uld"])
def test_aligned_spans_written_out(kind):
    student, teacher, ids_s, ids_t, spans = span_setting()
    matches = torch.tensor([0, 3, 5]), torch.tensor([2, 1, 10])
    expected = []
    for b, row in enumerate(spans):
        for s0, s1, t0, t1 in row:
            q, p = student[b].softmax(-1), teacher[b].softmax(-1)
            qs = math.prod(q[i, ids_s[b, i]].item() for i in range(s0, s1))
            ps = math.prod(p[i, ids_t[b, i]].item() for i in range(t0, t1))
            kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b))  # noqa: E731
            value = kl((ps, 1 - ps), (qs, 1 - qs))
            if kind == "matched" and s1 - s0 == t1 - t0 == 1:
                coarse_p, coarse_q = (
                    [*x[r, m].tolist(), 1 - x[r, m].sum().item()]
                    for x, r, m in ((p, t0, matches[1]), (q, s0, matches[0]))
                )
                value = kl(coarse_p, coarse_q)
            if kind == "uld":
                q_last, p_last = (
                    x[stop - 1] * (joint / x[stop - 1, ids[b, stop - 1]])
                    for x, stop, joint, ids in ((q, s1, qs, ids_s), (p, t1, ps, ids_t))
                )
                value = (
                    (
                        F.pad(q_last.sort(descending=True).values, (0, 3))
                        - p_last.sort(descending=True).values
                    )
                    .abs()
                    .sum()
                    .item()
                )
            expected.append(value)
    loss = aligned_span_loss(student, teacher, ids_s, ids_t, spans, kind, matches=matches)
    assert loss.item() == pytest.approx(sum(expected) / 5, rel=1e-9)
    assert aligned_span_loss(
        student, teacher, ids_s, ids_t, spans, kind, matches=matches, denominator=10
    ) == pytest.approx(loss.item() / 2)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: aligned_span_loss(z, teacher, ids_s, ids_t, spans, kind, 1.4, matches=matches),
        [student],
    )


def test_aligned_spans_of_one_tokenizer_are_the_divergences_of_positions():
    student, teacher, ids, _, spans = span_setting(same=True)
    everything = torch.arange(8), torch.arange(8)
    loss = partial(aligned_span_loss, student, teacher, ids, ids, spans)
    assert torch.isclose(loss("matched", matches=everything), forward_kl(student, teacher))
    assert torch.isclose(loss("uld"), uld(student, teacher))
    assert torch.isclose(
        loss("likelihood"), dkd(student, teacher, target_ids=ids, alpha=1.0, beta=0.0)
    )
    assert torch.isclose(
        loss("matched", 2.0, matches=everything, scale_t2=True),
        forward_kl(student, teacher, temperature=2.0, scale_t2=True),
    )
    assert loss("matched", matches=(torch.tensor([1, 2]), torch.tensor([1, 2]))) < forward_kl(
        student, teacher
    )  # a coarser question


@pytest.mark.parametrize("kind", ["likelihood", "matched", "uld"])
@pytest.mark.parametrize("edge", ["cold", "sure", "equal", "banned", "float16"])
def test_aligned_spans_at_the_edges(kind, edge):
    student, teacher, ids_s, ids_t, spans = span_setting(same=edge == "equal")
    temperature = 0.05 if edge == "cold" else 1.0
    if edge == "sure":
        student, teacher = (
            x.scatter_add(-1, i.unsqueeze(-1), torch.full_like(x, 90.0))
            for x, i in ((student, ids_s), (teacher, ids_t))
        )
    if edge == "equal":
        teacher = student.clone()
    if edge == "banned":
        student, teacher = (
            x.masked_fill((torch.arange(x.shape[-1]) == 7) & (i != 7).unsqueeze(-1), -math.inf)
            for x, i in ((student, ids_s), (teacher, ids_t))
        )
    if edge == "float16":
        student, teacher = student.half(), teacher.half()
    student = student.clone().requires_grad_()
    matches = (
        (torch.arange(8),) * 2
        if edge == "equal"
        else (torch.tensor([0, 3, 5, 7]), torch.tensor([2, 1, 10, 7]))
    )
    loss = aligned_span_loss(
        student, teacher.requires_grad_(), ids_s, ids_t, spans, kind, temperature, matches=matches
    )
    slope = gradient(loss, student)
    assert (
        loss.isfinite()
        and slope.isfinite().all()
        and loss >= -1e-12
        and loss.dtype in (torch.float32, torch.float64)
    )
    if edge == "equal":
        assert loss.abs() < 1e-12 and slope.abs().max() < 1e-12


def test_aligned_spans_refuse_what_does_not_fit():
    student, teacher, ids_s, ids_t, spans = span_setting()
    with pytest.raises(UserError, match="outside"):
        aligned_span_loss(student, teacher, ids_s, ids_t, [[Span(4, 6, 0, 1)], []])
    with pytest.raises(UserError, match="student_ids"):
        aligned_span_loss(student, teacher, ids_t, ids_t, spans)
    with pytest.raises(UserError, match="matching_tokens"):
        aligned_span_loss(student, teacher, ids_s, ids_t, spans, "matched")
    with pytest.raises(UserError, match="no unmasked position|no span"):
        aligned_span_loss(student, teacher, ids_s, ids_t, [[], []])
    student.requires_grad_()
    nothing = aligned_span_loss(student, teacher, ids_s, ids_t, [[], []], denominator=3)
    assert nothing == 0 and not gradient(nothing, student).any()


def test_positions_outside_of_the_spans_do_not_matter():
    student, teacher, ids_s, ids_t, spans = span_setting()
    poisoned, ids = student.clone(), ids_s.clone()
    poisoned[0, 4], poisoned[1, 0], ids[0, 4] = math.nan, math.inf, -100
    assert aligned_span_loss(poisoned, teacher, ids, ids_t, spans) == aligned_span_loss(
        student, teacher, ids_s, ids_t, spans
    )


def test_a_letter_of_sentencepiece_is_no_byte_of_the_other():
    "Byte-level BPE writes the byte 0xE9 as the letter é; alone it decodes to nothing that one could read."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁the", "▁caf", "é", "ü", "a", "<0xC3>"]
    piece = Tokenizer(models.Unigram([(w, -1.0) for w in words], unk_id=0, byte_fallback=False))
    piece.pre_tokenizer, piece.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(["</s>", *letters, "Ġthe", "Ã©"])}, merges=[])
    )
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    student, teacher = (
        PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>") for t in (piece, bpe)
    )
    pairs = {
        (student.convert_ids_to_tokens(a), teacher.convert_ids_to_tokens(b))
        for a, b in zip(*(x.tolist() for x in matching_tokens(student, teacher)))
    }
    assert pairs == {("</s>", "</s>"), ("▁the", "Ġthe"), ("é", "Ã©"), ("a", "a"), ("<0xC3>", "Ã")}
    for a, b in pairs - {("</s>", "</s>"), ("<0xC3>", "Ã")}:
        assert (
            student.decode(student.convert_tokens_to_ids(a)).strip()
            == teacher.decode(teacher.convert_tokens_to_ids(b)).strip()
        )


def test_matching_tokens(tokenizers):
    student, teacher = tokenizers
    a, b = matching_tokens(student, teacher)
    texts = [
        [tok.convert_ids_to_tokens(i) for i in ids.tolist()]
        for tok, ids in ((student, a), (teacher, b))
    ]
    assert (
        texts[0] == texts[1]
        and {"</s>", "hell", "Ġwor"} <= set(texts[0])
        and not {"hello", "Ġthere", "<s>"} & set(texts[0])
    )


def test_order_drifts_and_spans_do_not(tokenizers):
    text = "hello world there"
    (ids_s, ends_s), (ids_t, ends_t) = (token_ends(tok, text) for tok in tokenizers)
    in_order = spans_in_order(torch.ones(1, len(ids_s)), torch.ones(1, len(ids_t)))[0]
    assert len(in_order) == min(len(ids_s), len(ids_t)) and in_order[2] == (2, 3, 2, 3)
    assert spans_in_order(torch.tensor([[0, 1, 1]]), torch.tensor([[1, 0, 1, 1]])) == [
        [(1, 2, 0, 1), (2, 3, 2, 3)]
    ]


# --- peers ------------------------------------------------------------------------------------------------------------------------


def test_agreement_with_torch():
    student, teacher, ids = batch()
    flat_s, flat_t = student.flatten(0, 1), teacher.flatten(0, 1)
    forward = F.kl_div(
        flat_s.log_softmax(-1), flat_t.log_softmax(-1), reduction="batchmean", log_target=True
    )
    reverse = F.kl_div(
        flat_t.log_softmax(-1), flat_s.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert torch.isclose(forward_kl(student, teacher), forward) and torch.isclose(
        reverse_kl(student, teacher), reverse
    )
    assert torch.isclose(
        cross_entropy(student, teacher), F.cross_entropy(flat_s, flat_t.softmax(-1))
    )
    d = torch.distributions
    assert torch.allclose(
        token_divergence("forward_kl", student, teacher),
        d.kl_divergence(d.Categorical(logits=teacher), d.Categorical(logits=student)),
    )


@pytest.fixture(scope="module")
def trl_jsd():
    module = pytest.importorskip(
        "trl.experimental.gkd.gkd_trainer", reason="TRL is optional", exc_type=ImportError
    )
    return module.GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_agreement_with_trl(trl_jsd, beta):
    student, teacher, _ = batch(rows=4)
    labels = torch.tensor([[1, 1, 1, 1], [1, 1, -100, -100], [1, -100, 1, 1], [-100, -100, 1, 1]])
    ours = {0.0: forward_kl, 1.0: reverse_kl}.get(beta, partial(jsd, beta=beta))
    z = student.clone().requires_grad_()
    mine = ours(z, teacher, labels != -100, 2.0)
    theirs = trl_jsd(z, teacher, labels, beta=beta, temperature=2.0)
    assert torch.isclose(mine, theirs) and torch.allclose(gradient(mine, z), gradient(theirs, z))
    assert torch.isclose(
        ours(student, teacher, labels != -100, denominator=20),
        trl_jsd(student, teacher, labels, beta=beta, num_items_in_batch=20),
    )


def test_the_jump_of_trl(trl_jsd):
    student, teacher, _ = batch()
    labels = torch.ones(3, 4)
    assert trl_jsd(student, teacher, labels, beta=0.0) > 50 * trl_jsd(
        student, teacher, labels, beta=0.01
    )
    ours = [jsd(student, teacher, beta=b, scaled=True).item() for b in (0.0, 0.01)]
    assert ours[0] == pytest.approx(trl_jsd(student, teacher, labels, beta=0.0).item()) and ours[
        1
    ] == pytest.approx(ours[0], rel=0.1)


def test_agreement_with_trl_on_merged_spans():
    gold = pytest.importorskip(
        "trl.experimental.gold.gold_trainer", reason="TRL is optional", exc_type=ImportError
    )
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.3,
        uld_teacher_temperature=1.3,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy="bayesian",
    )
    student, teacher, ids_s, ids_t, _ = span_setting()
    student, teacher, ids_s, ids_t = student[:1], teacher[:1], ids_s[:1], ids_t[:1]
    ends_s, ends_t = (
        [2, 5, 7, 9],
        [2, 4, 5, 8, 9],
    )  # tokens 1.. of the student, 1.. of the teacher; token 0 is the prompt
    offsets = [list(zip([0, *ends[:-1]], ends)) for ends in (ends_s, ends_t)]
    labels_s, labels_t = (
        torch.cat([torch.tensor([[-100]]), ids[:, 1:]], 1) for ids in (ids_s, ids_t)
    )
    theirs = gold.ULDLoss(config)(
        student,
        teacher,
        labels_s,
        labels_t,
        ids_s,
        ids_t,
        *(torch.tensor([[(0, 0), *pairs]]) for pairs in offsets),
    )
    spans = [align_spans(ends_s, ends_t)]  # row 0 predicts token 1
    targets = [
        torch.cat([ids[:, 1:], torch.zeros(1, 1, dtype=torch.long)], 1) for ids in (ids_s, ids_t)
    ]
    assert spans == [[(0, 1, 0, 1), (1, 2, 1, 3), (2, 4, 3, 5)]]
    assert torch.isclose(aligned_span_loss(student, teacher, *targets, spans, "uld", 1.3), theirs)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_agreement_with_liger(beta):
    liger = pytest.importorskip(
        "liger_kernel.chunked_loss", reason="Liger is optional", exc_type=ImportError
    )
    g = torch.Generator().manual_seed(0)
    h_s, h_t, w_s, w_t = (
        torch.randn(n, d, generator=g) for n, d in ((10, 6), (10, 8), (12, 6), (12, 8))
    )
    labels = torch.randint(12, (10,), generator=g).masked_fill(torch.arange(10) % 4 == 1, -100)
    loss = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        temperature=2.0,
        compiled=False,
        chunk_size=4,
    )
    h = h_s.clone().requires_grad_()
    theirs = loss(h, w_s, h_t, w_t, labels)
    ours = {0.0: forward_kl, 1.0: reverse_kl}.get(beta, partial(jsd, beta=beta))(
        h @ w_s.T, h_t @ w_t.T, labels != -100, 2.0
    )
    assert torch.isclose(ours, theirs, rtol=1e-5) and torch.allclose(
        gradient(ours, h), gradient(theirs, h), atol=1e-5
    )


def test_padding_with_zeros_is_what_we_do_not_do():
    "Phantom tokens: a logit of 0 beside logits around -6 takes nearly everything."
    student, teacher = torch.randn(4, 1000) - 6, torch.randn(4, 1128) - 6
    aligned = reverse_kl(*align_vocabulary(student, teacher, size=1000))
    zeros = reverse_kl(F.pad(student, (0, 128)), teacher)
    assert zeros > 2 * aligned and cross_tokenizer_module.align_vocabulary(
        student, teacher, size=1000
    )[0].shape == (4, 1000)


# --- labels -----------------------------------------------------------------------------------------------------------------------


def call(name, student, teacher, ids=None, **given):
    "The public loss of that name."
    options = {"target_ids": ids} if name in NEEDS_GOLD and ids is not None else {}
    return get_divergence(name, **options)(student, teacher, **given)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_labels_choose_the_positions_that_a_mask_would(name):
    "In value and in gradient; where a label is -100, logits of any kind change nothing."
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 7), torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.tensor([[-100, 3, 1, -100, -100], [-100, -100, -100, 6, 0]])
    by_labels = call(name, student, teacher, labels=labels)
    by_mask = call(name, student, teacher, labels.clamp(min=0), mask=labels != -100)
    assert torch.equal(by_labels, by_mask)
    (slope,) = torch.autograd.grad(by_labels, student)
    assert (slope[labels == -100] == 0).all() and (slope[labels != -100] != 0).any()
    poisoned = torch.where((labels == -100).unsqueeze(-1), torch.nan, student.detach())
    assert torch.equal(call(name, poisoned, teacher, labels=labels), by_labels.detach())
    joined = call(name, student, teacher, labels=labels, mask=torch.arange(5).expand(2, 5) < 2)
    assert torch.equal(
        joined, call(name, student[:1, 1:2], teacher[:1, 1:2], labels=labels[:1, 1:2])
    )


def test_labels_of_a_batch_move_to_the_position_that_predicts_them():
    "A teacher that is certain of the gold token makes forward KL the language-modelling loss: an off-by-one would show."
    torch.manual_seed(0)
    input_ids = torch.tensor([[4, 2, 5, 1], [3, 6, 2, 0]])
    labels = torch.tensor([[-100, -100, 5, 1], [-100, 6, -100, -100]])
    logits = torch.randn(2, 4, 7)
    sure = torch.zeros(2, 4, 7)
    sure[:, :-1].scatter_(2, input_ids[:, 1:].unsqueeze(-1), 60.0)
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(forward_kl(logits, sure, labels=next_token_labels(labels)), wanted)
    assert abs(forward_kl(logits, sure, labels=labels) - wanted) > 0.01


def test_labels_that_do_not_fit():
    logits = torch.randn(1, 3, 4)
    with pytest.raises(UserError, match="next_token_labels"):
        forward_kl(logits, logits, labels=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(UserError, match="no unmasked position"):
        forward_kl(logits, logits, labels=torch.full((1, 3), -100))
