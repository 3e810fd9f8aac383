"""The logit cache: mathematics of what is kept, files that survive kills, refusals, and training from it without a teacher."""

import copy
import json
import math
import subprocess
import sys
import textwrap
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_notes.core import read_jsonl, UserError
from kd_notes.losses.divergences import token_divergence
from kd_notes.losses.sparse import (
    coarse_logits,
    draw_samples,
    draw_uniforms,
    keep_top_k,
    rectangle,
    sampled_divergence,
    SUPPORTED,
    topk_divergence,
)
from kd_notes.data.rows import store_rows
from kd_notes.methods.cache_writer import (
    bytes_per_position,
    length_batches,
    Recipe,
    shard_plan,
    tokenizer_hash,
)
from kd_notes.methods.logit_cache import cached_divergence, LogitCache, write_cache
from kd_notes.methods.logit_kd import KD
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.models.pretrained import weights_hash
from kd_notes.training.batches import target_logits, target_positions
from kd_notes.training.loop import train
from kd_notes.training.method import SFT
from kd_notes.training.state import TrainConfig

torch.set_num_threads(1)
VOCAB = 64
NAMES = SUPPORTED["topk"]


class Ids:
    "A tokenizer as far as rows of ids need one."

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, size=VOCAB, swap=False):
        self.vocab = {str(i): i for i in range(size)}
        if swap:
            self.vocab["5"], self.vocab["6"] = 6, 5

    def get_vocab(self):
        return dict(self.vocab)


def make_rows(n, seed=0, longest=9, vocab=VOCAB):
    g = torch.Generator().manual_seed(seed)

    def ids(low):
        return torch.randint(
            4, vocab, (int(torch.randint(low, longest, (1,), generator=g)),), generator=g
        ).tolist()

    return [{"id": f"r{i}", "prompt": [2, *ids(1)], "completion": [*ids(1), 1]} for i in range(n)]


ROWS = make_rows(24)


def teacher_of(seed=0, family="causal", vocab=VOCAB):
    return mini_model(family, "xs", vocab, seed).eval()


@pytest.fixture(scope="module")
def teacher():
    return teacher_of()


def write(folder, teacher, rows=ROWS, **changes):
    return write_cache(
        folder,
        teacher,
        Ids(teacher.config.vocab_size),
        rows,
        **({"k": 8, "shard_tokens": 30} | changes),
    )


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


def logits_alone(teacher, row):
    "Logits (target tokens, V) of a causal teacher on one row without padding: position t predicts token t + 1."
    with torch.no_grad():
        return teacher(torch.tensor([row["prompt"] + row["completion"]])).logits[
            0, len(row["prompt"]) - 1 : -1
        ]


def random_logits(n, v, seed, scale=3.0):
    return scale * torch.randn(
        n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# ---------------------------------------------------------------- the tail bucket


@settings(max_examples=60, deadline=None)
@given(
    v=st.integers(2, 40),
    data=st.data(),
    seed=st.integers(0, 10**6),
    scale=st.floats(0.1, 12),
    name=st.sampled_from(NAMES),
)
def test_a_coarsened_divergence_lies_between_0_and_the_full_one(v, data, seed, scale, name):
    k = data.draw(st.integers(1, v))
    student, teacher = random_logits(3, v, seed, scale), random_logits(3, v, seed + 1, scale)
    full, coarse = (
        token_divergence(name, student, teacher),
        topk_divergence(student, **keep_top_k(teacher, k), divergence=name),
    )
    slack = 1e-9 * (1 + full.abs())
    assert (coarse >= -slack).all() and (coarse <= full + slack).all()
    if k == v:
        torch.testing.assert_close(coarse, full, atol=1e-9, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 20), k=st.integers(1, 30))
def test_rounding_to_half_precision_never_makes_it_negative(seed, scale, k):
    "The stored numbers need not sum to one; the loss is a divergence all the same."
    student, kept = (
        random_logits(4, 30, seed, scale).float(),
        keep_top_k(random_logits(4, 30, seed + 1, scale).float(), k),
    )
    rounded = kept | {"log_probs": kept["log_probs"].half()}
    for name in ("forward_kl", "reverse_kl", "jsd"):
        value, exact = (topk_divergence(student, **x, divergence=name) for x in (rounded, kept))
        assert (value >= -1e-6).all()
        torch.testing.assert_close(value, exact, atol=2e-2, rtol=2e-2)


def test_truncation_goes_negative_where_the_bucket_does_not():
    teacher, student = (
        torch.tensor([[2.0, 1.5, 0.0, 0.0, 0.0]]),
        torch.tensor([[2.6, 2.1, 0.0, 0.0, 0.0]]),
    )
    kept = keep_top_k(teacher, 2)
    log_q = student.log_softmax(-1).gather(-1, kept["ids"])
    assert (kept["log_probs"].exp() * (kept["log_probs"] - log_q)).sum() < -0.05
    assert 0 < topk_divergence(student, **kept) <= token_divergence("forward_kl", student, teacher)


def test_gradient_of_the_bucket_derived_by_hand():
    "q - p for a kept token; for another q (1 - tail of p / tail of q): inside the bucket there is no signal about the shape."
    student, teacher = random_logits(5, 12, 0).requires_grad_(), random_logits(5, 12, 1)
    kept = keep_top_k(teacher, 4)
    (grad,) = torch.autograd.grad(topk_divergence(student, **kept).sum(), student)
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, kept["ids"], True)
    tails = [(x * ~inside).sum(-1, keepdim=True) for x in (p, q)]
    torch.testing.assert_close(grad, torch.where(inside, q - p, q * (1 - tails[0] / tails[1])))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_every_supported_divergence(name):
    student, kept = random_logits(3, 7, 2).requires_grad_(), keep_top_k(random_logits(3, 7, 3), 3)
    assert torch.autograd.gradcheck(lambda z: topk_divergence(z, **kept, divergence=name), student)


def test_coarse_logits_keep_leading_dimensions_and_upcast():
    z, ids = (
        random_logits(6, 9, 0).view(2, 3, 9),
        torch.tensor([[0, 4], [1, 2], [8, 7]]).expand(2, 3, 2),
    )
    whole = coarse_logits(z, ids)
    torch.testing.assert_close(whole.logsumexp(-1), z.logsumexp(-1))
    assert whole.shape == (2, 3, 3) and coarse_logits(z.bfloat16(), ids).dtype == torch.float32


def test_banned_tokens_and_sure_teachers_stay_finite():
    "-inf logits shared by both, a one-hot teacher, and logits far apart: value and gradient are numbers."
    student = torch.tensor(
        [[4.0, 1.0, -math.inf, 0.0], [90.0, -90.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]],
        requires_grad=True,
    )
    teacher = torch.tensor(
        [[3.0, 1.0, -math.inf, 1.0], [-90.0, 90.0, 0.0, 0.0], [200.0, 0.0, 0.0, 0.0]]
    )
    for k in (1, 3, 4):
        for name in ("forward_kl", "total_variation", "skew_kl"):
            value = topk_divergence(student, **keep_top_k(teacher, k), divergence=name)
            (grad,) = torch.autograd.grad(value.sum(), student)
            assert value.isfinite().all() and grad.isfinite().all() and grad[0, 2] == 0


def test_student_equal_to_teacher_is_a_minimum():
    z = random_logits(4, 20, 5)
    for name in set(NAMES) - {"cross_entropy"}:
        x = z.clone().requires_grad_()
        value = topk_divergence(x, **keep_top_k(z, 6), divergence=name)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-7, name


def test_shift_and_joint_permutation_change_nothing():
    student, teacher, order = (
        random_logits(4, 15, 0),
        random_logits(4, 15, 1),
        torch.randperm(15, generator=torch.Generator().manual_seed(0)),
    )
    value = topk_divergence(student, **keep_top_k(teacher, 5))
    torch.testing.assert_close(topk_divergence(student + 7, **keep_top_k(teacher - 3, 5)), value)
    torch.testing.assert_close(
        topk_divergence(student[:, order], **keep_top_k(teacher[:, order], 5)), value
    )


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_is_that_of_the_full_divergence(temperature):
    student, teacher = random_logits(4, 15, 0), random_logits(4, 15, 1)
    kept = keep_top_k(teacher, 15, temperature)
    torch.testing.assert_close(
        topk_divergence(student, **kept, temperature=temperature),
        token_divergence("forward_kl", student, teacher, temperature),
    )


# ---------------------------------------------------------------- samples

DRAWN = [("systematic", 1.0), ("iid", 1.0), ("systematic", 0.6), ("iid", 1.5)]


def mean_weights(logits, samples, draw, power, repeats, seed=0):
    "Mean and standard error of the sparse vector over many draws at one position, (V,) each."
    d = draw_samples(
        logits.expand(repeats, -1),
        draw_uniforms(repeats, samples, draw, torch.Generator().manual_seed(seed)),
        power,
    )
    row = torch.repeat_interleave(torch.arange(repeats), d["unique"])
    w = torch.zeros(repeats, logits.shape[-1], dtype=torch.float64).index_put_(
        (row, d["ids"]), d["weights"]
    )
    return w.mean(0), w.std(0) / repeats**0.5


@pytest.mark.parametrize("draw, power", DRAWN)
def test_samples_are_unbiased_and_renormalised_top_k_is_not(draw, power):
    "Every coordinate of the mean within 4.5 standard errors of the teacher; the same bound refuses the renormalised best 6 of 12."
    z = random_logits(1, 12, 3, scale=1.5)
    p, repeats = z[0].softmax(-1), 30_000
    mean, error = mean_weights(z, 6, draw, power, repeats)
    assert ((mean - p).abs() <= 4.5 * error + 1e-9).all()
    kept = keep_top_k(z, 6)
    renormalised = torch.zeros_like(p).scatter(0, kept["ids"][0], kept["log_probs"][0].softmax(-1))
    assert ((renormalised - p).abs() > 20 * error).sum() >= 6


def test_scaling_the_weights_to_one_would_bias_them():
    "Why the weights of another proposal are left as they are: self-normalised ones miss the teacher by many standard errors."
    z, repeats = random_logits(1, 12, 3, scale=1.5), 30_000
    d = draw_samples(
        z.expand(repeats, -1),
        draw_uniforms(repeats, 2, "iid", torch.Generator().manual_seed(0)),
        0.3,
    )
    row = torch.repeat_interleave(torch.arange(repeats), d["unique"])
    w = torch.zeros(repeats, 12, dtype=torch.float64).index_put_((row, d["ids"]), d["weights"])
    p, scaled = z[0].softmax(-1), w / w.sum(-1, keepdim=True)
    assert ((w.mean(0) - p).abs() <= 4.5 * w.std(0) / repeats**0.5).all()
    assert ((scaled.mean(0) - p).abs() > 8 * scaled.std(0) / repeats**0.5).any()


def test_gradient_and_value_from_samples_are_unbiased():
    student, teacher, repeats = random_logits(1, 9, 0, 1.0), random_logits(1, 9, 1, 1.0), 20_000
    d = draw_samples(
        teacher.expand(repeats, -1),
        draw_uniforms(repeats, 4, generator=torch.Generator().manual_seed(2)),
    )
    ids, weights = (rectangle(d[key], d["unique"]) for key in ("ids", "weights"))
    x = student.expand(repeats, -1).clone().requires_grad_()
    values = sampled_divergence(x, ids, weights, d["entropy"])
    (grads,) = torch.autograd.grad(values.sum(), x)
    true = token_divergence("forward_kl", student, teacher)
    assert (values.mean() - true).abs() <= 4.5 * values.std() / repeats**0.5
    assert (
        (grads.mean(0) - (student - 0).softmax(-1) + teacher.softmax(-1)).abs()
        <= 4.5 * grads.std(0) / repeats**0.5
    ).all()
    cross = sampled_divergence(x, ids, weights, d["entropy"], "cross_entropy")
    torch.testing.assert_close(cross - values, d["entropy"])


@settings(max_examples=50, deadline=None)
@given(
    v=st.integers(2, 30),
    samples=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    draw=st.sampled_from(["systematic", "iid"]),
)
def test_draws_are_counted_right(v, samples, seed, draw):
    z = random_logits(3, v, seed, 2.0)
    d = draw_samples(z, draw_uniforms(3, samples, draw, torch.Generator().manual_seed(seed)))
    counts, ids = rectangle(d["counts"], d["unique"]), rectangle(d["ids"], d["unique"])
    assert (counts.sum(-1) == samples).all() and d["counts"].min() >= 1
    assert all(len(set(row[:n])) == n for row, n in zip(ids.tolist(), d["unique"].tolist()))
    if draw == "systematic":  # never more than one away from the expected count
        assert ((counts - samples * z.softmax(-1).gather(-1, ids)).abs() < 1 + 1e-6)[
            counts > 0
        ].all()


def test_impossible_tokens_are_never_drawn():
    z = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]])
    d = draw_samples(z, draw_uniforms(1, 500, "iid", torch.Generator().manual_seed(0)))
    assert set(d["ids"].tolist()) == {0, 2} and d["entropy"].isfinite().all()


@pytest.mark.parametrize("draw", ["systematic", "iid"])
def test_variance_of_the_draws(draw):
    "p (1 - p)/n for independent draws, f (1 - f)/n^2 with f the fractional part of np for systematic ones."
    z, n, repeats = random_logits(1, 10, 4, 1.0), 7, 40_000
    p = z[0].softmax(-1)
    _, error = mean_weights(z, n, draw, 1.0, repeats)
    f = (n * p) % 1
    expected = p * (1 - p) / n if draw == "iid" else f * (1 - f) / n**2
    torch.testing.assert_close(error**2 * repeats, expected, rtol=0.08, atol=1e-6)


def test_many_samples_become_the_full_forward_kl():
    student, teacher = random_logits(2, 10, 0), random_logits(2, 10, 1)
    d = draw_samples(teacher, draw_uniforms(2, 200_000))
    ids, weights = (rectangle(d[key], d["unique"]) for key in ("ids", "weights"))
    torch.testing.assert_close(
        sampled_divergence(student, ids, weights, d["entropy"]),
        token_divergence("forward_kl", student, teacher),
        atol=1e-3,
        rtol=1e-3,
    )


@pytest.mark.parametrize(
    "mode, name",
    [
        ("sampled", "reverse_kl"),
        ("sampled", "jsd"),
        ("topk", "adaptive_kl"),
        ("topk", "dkd"),
        ("topk", "uld"),
        ("sampled", "nonsense"),
    ],
)
def test_divergences_that_are_not_defined_are_refused_with_the_reason(
    mode, name, tmp_path, teacher
):
    cache = write(tmp_path, teacher, mode=mode)
    with pytest.raises(
        UserError, match="not linear" if mode == "sampled" else "sum of the tail only"
    ) as e:
        KD(Ids(), cache, name)
    assert "forward_kl" in str(e.value)


# ---------------------------------------------------------------- files


def test_what_is_read_is_what_the_teacher_says_on_each_row_alone(tmp_path, teacher):
    "Right by one position, whatever the batch, the padding and the order of reading."
    cache = write(tmp_path, teacher, dtype="float32", batch_tokens=40)
    for row in reversed(ROWS):
        got, want = cache.targets([row["id"]]), keep_top_k(logits_alone(teacher, row), 8)
        torch.testing.assert_close(got["cache_log_probs"], want["log_probs"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got["cache_tail"], want["tail"], atol=1e-5, rtol=1e-4)
        assert torch.equal(got["cache_ids"].long(), want["ids"])
    rows = list(cache)
    assert (
        [{k: r[k] for k in ("id", "prompt", "completion")} for r in rows] == ROWS
        and cache.complete
        and len(cache) == len(ROWS)
    )


def test_encoder_decoder_teachers(tmp_path):
    teacher = teacher_of(family="t5")
    cache = write(tmp_path, teacher, dtype="float32", k=VOCAB)
    batch = SFT(Ids(), "t5").collate(ROWS[:5])
    got = cache.targets([r["id"] for r in ROWS[:5]])
    with torch.no_grad():
        want = target_logits(teacher, batch).log_softmax(-1)
    torch.testing.assert_close(
        got["cache_log_probs"], want.gather(-1, got["cache_ids"].long()), atol=1e-5, rtol=1e-4
    )


def test_samples_through_the_files_are_unbiased(tmp_path, teacher):
    "One text under 800 ids: each is drawn for itself, and the mean of what is read is the teacher's distribution."
    rows = [ROWS[0] | {"id": f"copy-{i}"} for i in range(800)]
    cache = write(tmp_path, teacher, rows, mode="sampled", samples=5, shard_tokens=10**6)
    got, n = cache.targets([r["id"] for r in rows]), len(ROWS[0]["completion"])
    w = (
        torch.zeros(len(got["cache_ids"]), VOCAB)
        .scatter_add_(-1, got["cache_ids"].long(), got["cache_weights"])
        .view(800, n, VOCAB)
    )
    p = logits_alone(teacher, ROWS[0]).softmax(-1)
    assert ((w.mean(0) - p).abs() <= 5 * w.std(0) / 800**0.5 + 1e-6).all()
    torch.testing.assert_close(
        got["cache_entropy"][:n], torch.special.entr(p).sum(-1), atol=1e-4, rtol=1e-4
    )
    assert not torch.equal(w[0], w[1]) and torch.equal(
        cache.targets(["copy-7"])["cache_weights"], cache.targets(["copy-7"])["cache_weights"]
    )


RECIPES = [
    dict(k=8),
    dict(k=3, dtype="float32"),
    dict(mode="sampled", samples=20),
    dict(mode="sampled", samples=300, draw="iid"),
    dict(mode="sampled", samples=20, power=0.8),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_predicted_bytes(recipe, tmp_path, teacher):
    cache = write(tmp_path, teacher, shard_tokens=10**6, **recipe)
    n = cache.head["rows"]["positions"]
    unique = None
    if cache.recipe.mode == "sampled":
        unique = (cache.targets(list(cache.places))["cache_weights"] > 0).sum().item() / n
    prompts = sum(2 * len(r["prompt"]) + 8 for r in ROWS)  # ids, and two lengths of four bytes
    header = int.from_bytes((tmp_path / "shard-00000.safetensors").read_bytes()[:8], "little") + 8
    assert cache.index[0]["bytes"] == pytest.approx(
        bytes_per_position(cache.recipe, VOCAB, unique) * n + prompts + header, abs=1
    )


def test_large_vocabularies_get_wider_ids(tmp_path):
    teacher = teacher_of(vocab=66_000)
    rows = make_rows(3, vocab=66_000)
    cache = write(tmp_path, teacher, rows, k=4)
    got = cache.targets(["r1"])
    assert torch.equal(
        got["cache_ids"].long(), keep_top_k(logits_alone(teacher, rows[1]), 4)["ids"]
    )
    assert [r["completion"] for r in cache] == [r["completion"] for r in rows] and max(
        max(r["completion"]) for r in rows
    ) > 2**15


def test_padded_vocabularies_are_cut_to_the_tokenizer(tmp_path):
    "The teacher's 64 logits, 50 of them tokens: the distribution is over 50, and a student with more logits is cut too."
    teacher, rows = teacher_of(), make_rows(4, vocab=50)
    cache = write_cache(tmp_path, teacher, Ids(50), rows, k=50, dtype="float32")
    got = cache.targets(["r0"])
    torch.testing.assert_close(
        got["cache_log_probs"].exp().sum(-1), torch.ones(len(rows[0]["completion"]))
    )
    student = torch.randn(len(rows[0]["completion"]), 60)
    want = token_divergence("reverse_kl", student[:, :50], logits_alone(teacher, rows[0])[:, :50])
    torch.testing.assert_close(
        cached_divergence(student, got, cache, "reverse_kl"), want, atol=1e-5, rtol=1e-4
    )
    with pytest.raises(UserError, match="40 logits"):
        cached_divergence(student[:, :40], got, cache)


def test_the_teacher_is_left_as_it_was_and_speaks_without_dropout(tmp_path):
    teacher = mini_model("causal", "xs", VOCAB, 0, dropout=0.5)
    assert teacher.training
    a, b = write(tmp_path / "a", teacher), write(tmp_path / "b", teacher)
    plain = write(tmp_path / "c", teacher_of())
    made, again, without = (contents(cache.folder) for cache in (a, b, plain))
    assert made == again
    # The configs differ in the dropout, the targets do not.
    assert made.pop("cache.json") != without.pop("cache.json") and made == without
    assert teacher.training and all(p.grad is None for p in teacher.parameters())


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), tokens=st.integers(1, 120))
def test_plans_hold_every_row_once(lengths, tokens):
    plan = shard_plan(lengths, tokens)
    assert [i for part in plan for i in part] == [*range(len(lengths))]
    assert all(sum(lengths[i] for i in part) >= tokens for part in plan[:-1])
    assert all(sum(lengths[i] for i in part[:-1]) < tokens for part in plan)
    batches = length_batches(lengths, tokens)
    assert sorted(i for b in batches for i in b) == [*range(len(lengths))]
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= tokens for b in batches)
    assert [lengths[i] for b in batches for i in b] == sorted(lengths, reverse=True)


def test_stored_rows_make_the_cache_of_the_list_and_stay_on_the_disk(tmp_path):
    teacher = mini_model("causal", "xxs", 1000, seed=0)

    def fresh():
        return make_rows(1500, longest=60, vocab=1000)

    stored = store_rows(tmp_path / "rows", "test", fresh())
    made, peaks = {}, {}
    for name, rows_of in (("stored", lambda: stored), ("listed", fresh)):
        tracemalloc.start()
        cache = write(tmp_path / name, teacher, rows_of(), k=4, shard_tokens=2000)
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        made[name] = contents(cache.folder)
        assert len(cache) == 1500
    assert made["stored"] == made["listed"]
    assert peaks["listed"] - peaks["stored"] > 700_000, peaks  # bytes


# ---------------------------------------------------------------- kills, full disks, damage

KILLS = """
import json, os, resource, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_logit_cache import LogitCache, contents, make_rows, teacher_of, write
from kd_notes.core import UserError

teacher, rows, real = teacher_of(), make_rows(90, seed=3), os.replace
root, report = Path({root!r}), {{}}
reference = contents(write(root/"reference", teacher, rows, shard_tokens=40).folder)

def killed(name, before):
    "Write in a child process; `before` sets up its end. Then: what is left, and is the resumed cache the same?"
    pid = os.fork()
    if pid == 0:
        before()
        try:
            write(root/name, teacher, rows, shard_tokens=40)
        except UserError as e:
            (root/f"{{name}}.txt").write_text(str(e))
        os._exit(7)
    while name == "outside" and os.waitpid(pid, os.WNOHANG) == (0, 0):
        index = root/name/"index.jsonl"
        if index.is_file() and index.read_bytes().count(b"\\n") >= 3:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        code = None
    left = sorted(p.name for p in (root/name).iterdir())
    if (root/name/"cache.json").is_file():
        prefix = LogitCache(root/name)
        usable = [len(r["completion"]) == len(r["targets"]["cache_ids"]) for r in prefix]
        n, complete = len(prefix), prefix.complete
    else:
        usable, n, complete = [], 0, False
    write(root/name, teacher, rows, shard_tokens=40)
    report[name] = dict(code=code, left=left, usable=all(usable), prefix=n, complete=complete, same=contents(root/name) == reference,
                        hidden=sorted(p.name for p in (root/name).iterdir() if p.name.startswith(".")))

def kill_at(n, after):
    calls = [0]
    def replace(a, b):
        calls[0] += 1
        if after:
            real(a, b)
        if calls[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        if not after:
            real(a, b)
    return lambda: setattr(os, "replace", replace)

def small_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

for n in (1, 2, 5):
    killed(f"before-{{n}}", kill_at(n, False))
    killed(f"after-{{n}}", kill_at(n, True))
killed("outside", lambda: None)
killed("full", small_disk)
report["full"]["error"] = (root/"full.txt").read_text()
report["shards"], report["rows"] = len(reference) - 2, len(rows)
print(json.dumps(report))
"""


def python(code, **names):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code).format(**names)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    from pathlib import Path

    root = tmp_path_factory.mktemp("kills")
    return json.loads(
        python(KILLS, tests=str(Path(__file__).parent), root=str(root)).splitlines()[-1]
    )


@pytest.mark.parametrize(
    "name", ["before-1", "after-1", "before-2", "after-2", "before-5", "after-5", "outside"]
)
def test_kill_9_leaves_a_usable_prefix_and_the_same_call_ends_with_the_same_files(kills, name):
    found = kills[name]
    assert found["code"] == -9 and kills["shards"] > 8
    assert (
        found["same"]
        and found["usable"]
        and not found["complete"]
        and found["prefix"] < kills["rows"]
    )
    assert set(found["hidden"]) <= {".lock"}, (
        "what a killed process left beside the files is swept away"
    )


def test_kills_happened_at_different_places(kills):
    "In the middle of a file (its temporary is there), with a file that the index does not know yet, and from outside with three shards done."
    assert any(name.endswith(".tmp") for name in kills["before-5"]["left"]) and not any(
        n.endswith(".tmp") for n in kills["after-5"]["left"]
    )
    assert (
        "shard-00003.safetensors" in kills["after-5"]["left"]
        and "shard-00003.safetensors" not in kills["before-5"]["left"]
    )
    assert (
        kills["before-5"]["prefix"] == kills["after-5"]["prefix"] > 0
        and kills["outside"]["prefix"] > kills["after-2"]["prefix"] == 0
    )


def test_a_full_disk_is_a_user_error_and_leaves_nothing_half_written(kills):
    found = kills["full"]
    assert (
        found["code"] == 7
        and "shard-00000.safetensors" in found["error"]
        and "Free some space" in found["error"]
    )
    assert [name for name in found["left"] if not name.startswith(".")] == ["cache.json"]
    assert not any(name.endswith(".tmp") for name in found["left"]) and found["same"]


def test_too_small_a_disk_is_known_before_the_teacher_starts(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(
        "kd_notes.methods.cache_writer.shutil.disk_usage",
        lambda folder: type("Usage", (), {"free": 100}),
    )
    calls = []
    hook = teacher.model.register_forward_pre_hook(lambda *a: calls.append(1))
    with pytest.raises(UserError, match="the disk has"):
        write(tmp_path, teacher)
    hook.remove()
    assert not calls and not list(tmp_path.glob("shard*"))


def test_a_half_written_index_line_is_a_prefix(tmp_path, teacher):
    whole = contents(write(tmp_path, teacher).folder)
    index = tmp_path / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-20])
    assert 0 < len(LogitCache(tmp_path)) < len(ROWS)
    write(tmp_path, teacher)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_shard_is_refused_and_made_again(tmp_path, teacher, damage):
    whole = contents(write(tmp_path, teacher).folder)
    path = tmp_path / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink() if damage == "delete" else path.write_bytes(
        data if damage == "flip" else data[:-5]
    )
    with pytest.raises(UserError, match="shard-00001.*write_cache"):
        list(LogitCache(tmp_path))
    assert len(list(write(tmp_path, teacher))) == len(ROWS)
    assert {k: v for k, v in contents(tmp_path).items() if k.startswith("shard")} == {
        k: v for k, v in whole.items() if k.startswith("shard")
    }
    assert len({row["shard"] for row in read_jsonl(tmp_path / "index.jsonl")}) == len(whole) - 2


def test_a_finished_cache_does_not_ask_the_teacher_again(tmp_path, teacher):
    write(tmp_path, teacher)
    calls = []
    hook = teacher.model.register_forward_pre_hook(lambda *a: calls.append(1))
    write(tmp_path, teacher)
    hook.remove()
    assert not calls


def test_one_writer_at_a_time(tmp_path, teacher):
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="another process"):
        write(tmp_path, teacher)


# ---------------------------------------------------------------- refusals


def test_another_tokenizer_is_refused(tmp_path, teacher):
    cache, other = write(tmp_path, teacher), Ids(swap=True)
    assert tokenizer_hash(Ids()) == tokenizer_hash(Ids()) != tokenizer_hash(other)
    with pytest.raises(UserError, match="another tokenizer.*student with the teacher's tokenizer"):
        LogitCache(tmp_path, tokenizer=other)
    with pytest.raises(UserError, match="another tokenizer"):
        KD(other, cache)
    with pytest.raises(UserError, match="another tokenizer"):
        write_cache(tmp_path, teacher, other, ROWS, k=8, shard_tokens=30)
    assert len(LogitCache(tmp_path, tokenizer=Ids())) == len(ROWS)


def test_another_teacher_is_refused(tmp_path, teacher):
    write(tmp_path / "cache", teacher)
    other = teacher_of(seed=1)
    other.save_pretrained(tmp_path / "other")
    teacher.save_pretrained(tmp_path / "same")
    for wrong in (other, tmp_path / "other", weights_hash(other)):
        with pytest.raises(UserError, match="another teacher"):
            LogitCache(tmp_path / "cache", teacher=wrong)
    with pytest.raises(UserError, match="another teacher"):
        write(tmp_path / "cache", other)
    for right in (teacher, tmp_path / "same", weights_hash(teacher)):
        assert LogitCache(tmp_path / "cache", teacher=right).complete


def test_the_same_weights_with_another_config_are_another_teacher(tmp_path, teacher):
    write(tmp_path, teacher)
    other = copy.deepcopy(teacher)
    other.config.final_logit_softcapping = 2.0
    with pytest.raises(UserError, match="another teacher"):
        write(tmp_path, other)
    other.config = copy.deepcopy(teacher.config)
    assert write(tmp_path, other).complete


@pytest.mark.parametrize("family", ["causal", "t5"])
def test_weights_hash_of_a_model_and_of_its_folder(tmp_path, family):
    "Tied weights count once in both; bfloat16 weights hash like their float32 copies; one changed number changes it."
    model = teacher_of(family=family)
    model.save_pretrained(tmp_path / "f32")
    assert weights_hash(model) == weights_hash(tmp_path / "f32")
    half = copy.deepcopy(model).bfloat16()
    half.save_pretrained(tmp_path / "bf16")
    assert weights_hash(tmp_path / "bf16") == weights_hash(half.float()) != weights_hash(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] += 1e-3
    assert weights_hash(model) != weights_hash(tmp_path / "f32")
    with pytest.raises(UserError, match="no safetensors"):
        weights_hash(tmp_path)


def test_weights_hash_sees_every_bit_of_float64():
    model = torch.nn.Linear(2, 2).double()
    before = weights_hash(model)
    with torch.no_grad():
        model.weight[0, 0] = torch.nextafter(model.weight[0, 0], torch.ones(()).double())
    assert weights_hash(model) != before


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(k=9), "recipe"),
        (dict(temperature=2.0), "recipe"),
        (dict(rows=ROWS[:-1]), "rows"),
        (dict(shard_tokens=31), "layout"),
    ],
)
def test_another_call_in_the_same_folder_is_refused(tmp_path, teacher, change, word):
    before = contents(write(tmp_path, teacher).folder)
    with pytest.raises(UserError, match=f"another {word}"):
        write(tmp_path, teacher, **change)
    assert contents(tmp_path) == before


def test_an_example_with_another_encoding_or_id_is_refused(tmp_path, teacher):
    method = KD(Ids(), write(tmp_path, teacher))
    assert method.encode(ROWS[3])["completion"] == ROWS[3]["completion"]
    with pytest.raises(UserError, match="encoded differently"):
        method.encode(ROWS[3] | {"prompt": ROWS[3]["prompt"] + [9]})
    with pytest.raises(
        UserError, match="encoded differently"
    ):  # the same ids, cut at another place
        method.encode(
            ROWS[3]
            | {
                "prompt": ROWS[3]["prompt"] + ROWS[3]["completion"][:1],
                "completion": ROWS[3]["completion"][1:],
            }
        )
    with pytest.raises(UserError, match="no such row"):
        method.encode(ROWS[3] | {"id": "somebody else"})
    with pytest.raises(UserError, match="no id"):
        method.encode({k: v for k, v in ROWS[3].items() if k != "id"})


@pytest.mark.parametrize(
    "row, match",
    [
        ({"completion": []}, "empty"),
        ({"prompt": []}, "empty"),
        ({"completion": [VOCAB]}, "not below 64"),
        ({"prompt": [5] * 600}, "context has 512"),
        ({"id": "r0"}, "occurs twice"),
    ],
)
def test_rows_that_cannot_be_read_are_named_before_anything_is_written(
    tmp_path, teacher, row, match
):
    with pytest.raises(UserError, match=match) as e:
        write(tmp_path / "new", teacher, [*ROWS[:2], ROWS[2] | row])
    assert (row.get("id") or "r2") in str(e.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change",
    [
        dict(mode="best"),
        dict(k=0),
        dict(samples=0),
        dict(draw="x"),
        dict(power=0.0),
        dict(temperature=-1),
        dict(dtype="int8"),
        dict(temperature=math.nan),
    ],
)
def test_impossible_recipes(change):
    with pytest.raises(UserError, match=f"Recipe.{next(iter(change))}"):
        Recipe(**change)


def test_other_mistakes(tmp_path, teacher):
    with pytest.raises(UserError, match="no logit cache"):
        LogitCache(tmp_path)
    with pytest.raises(UserError, match="64 tokens there are"):
        write(tmp_path / "a", teacher, k=VOCAB + 1)
    with pytest.raises(UserError, match="there are no rows"):
        write(tmp_path / "a", teacher, [])
    assert not (tmp_path / "a").exists()
    cache = write(tmp_path / "b", teacher, mode="sampled")
    with pytest.raises(UserError, match="no options"):
        KD(Ids(), cache, floor=-20.0)
    with pytest.raises(UserError, match="sft_weight"):
        KD(Ids(), cache, sft_weight=1.0)
    with pytest.raises(UserError, match="no option"):
        KD(Ids(), write(tmp_path / "c", teacher), "forward_kl", alpha=0.1)
    head = json.loads((tmp_path / "b" / "cache.json").read_text())
    (tmp_path / "b" / "cache.json").write_text(json.dumps(head | {"format": "a later one"}))
    with pytest.raises(UserError, match="cache.json"):
        LogitCache(tmp_path / "b")


def test_a_teacher_that_overflows_is_named(tmp_path):
    teacher = teacher_of()
    with torch.no_grad():
        teacher.model.norm.weight.fill_(math.nan)
    for mode in ("topk", "sampled"):
        with pytest.raises(UserError, match="not finite"):
            write(tmp_path / mode, teacher, mode=mode)


# ---------------------------------------------------------------- the method


class LiveKD(SFT):
    "Word-level KD beside a live teacher: what KD from a cache with k = V must be equal to."

    loss_weights = {"kd": 1.0}

    def __init__(self, teacher, name="forward_kl", temperature=1.0):
        super().__init__(Ids())
        self.teacher, self.name, self.temperature = teacher, name, temperature

    def token_counts(self, batch):
        return {"kd": len(target_positions(batch).ids)}

    def loss_sums(self, model, batch):
        with torch.no_grad():
            spoken = target_logits(self.teacher, batch)
        return {
            "kd": token_divergence(
                self.name, target_logits(model, batch), spoken, self.temperature
            ).sum()
        }


def gradients_of(model, method, rows):
    batch = method.collate([method.encode(r) for r in rows])
    total = sum(method.loss_weights[k] * v for k, v in method.loss_sums(model, batch).items())
    return total.detach(), torch.autograd.grad(
        total, [p for p in model.parameters() if p.requires_grad]
    )


@pytest.mark.parametrize(
    "name", ["forward_kl", "reverse_kl", "jsd", "skew_reverse_kl", "total_variation"]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_every_token_kept_loss_and_gradient_are_those_of_plain_kd(tmp_path, name, temperature):
    teacher, student = teacher_of().double(), teacher_of(seed=5).double().train()
    cache = write(tmp_path, teacher, k=VOCAB, dtype="float32", temperature=temperature)
    loss, grads = gradients_of(student, KD(Ids(), cache, name), ROWS)
    want, wanted = gradients_of(student, LiveKD(teacher, name, temperature), ROWS)
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-6)
    for a, b in zip(grads, wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_whole_training_is_that_of_plain_kd(tmp_path, teacher):
    config = TrainConfig(max_steps=10, batch_size=6, lr=3e-3, log_every=1, device="cpu")
    cache = write(tmp_path, teacher, k=VOCAB, dtype="float32")
    runs = [
        train(teacher_of(seed=5), method, ROWS, config)
        for method in (LiveKD(teacher), KD(Ids(), cache))
    ]
    live, cached = ([row["loss"] for row in run.history] for run in runs)
    assert cached == pytest.approx(live, rel=1e-4) and cached[-1] < cached[0]


METHODS = [
    dict(),
    dict(divergence="reverse_kl", sft_weight=0.3),
    dict(mode="sampled"),
    dict(mode="sampled", sft_weight=0.5),
]


@pytest.mark.parametrize("kind", METHODS, ids=str)
def test_fused_sums_are_the_plain_ones(tmp_path, kind):
    "Value and gradient in float64, at a temperature, with a student whose vocabulary is padded."
    kind = dict(kind)
    cache = write(tmp_path, teacher_of(), mode=kind.pop("mode", "topk"), temperature=1.5)
    student = teacher_of(seed=5, vocab=VOCAB + 3).double()
    (a, plain), (b, fused) = (
        gradients_of(student, KD(Ids(), cache, scale_t2=True, fused=f, **kind), ROWS)
        for f in (False, True)
    )
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    for x, y in zip(plain, fused):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-9)


def test_fused_is_refused_where_logits_are_not_one_linear_layer(tmp_path):
    teacher = teacher_of(family="t5")
    method = KD(Ids(), write(tmp_path, teacher), family="t5", fused=True)
    with pytest.raises(UserError, match="fused=False"):
        method.loss_sums(teacher, method.collate([method.encode(r) for r in ROWS[:3]]))


@pytest.mark.parametrize("kind", METHODS, ids=str)
@pytest.mark.parametrize("family", ["causal", "t5"])
def test_neighbours_and_padding_change_no_number(tmp_path, kind, family):
    "The sum over a batch is the sum over its rows alone, in float64, in any order."
    kind = dict(kind)
    cache = write(tmp_path, teacher_of(family=family), mode=kind.pop("mode", "topk"))
    student = teacher_of(seed=5, family=family).double()
    method = KD(Ids(), cache, family=family, **kind)
    items = [method.encode(r) for r in ROWS[:7]]
    whole = method.loss_sums(student, method.collate(items[::-1]))
    alone = [method.loss_sums(student, method.collate([i])) for i in items]
    for term in method.loss_weights:
        torch.testing.assert_close(whole[term], sum(a[term] for a in alone), atol=1e-9, rtol=1e-9)
    n = sum(len(r["completion"]) for r in ROWS[:7])
    assert method.token_counts(method.collate(items)) == dict.fromkeys(method.loss_weights, n)


@pytest.mark.parametrize("kind", METHODS[1:3], ids=str)
def test_accumulation_changes_nothing(tmp_path, teacher, kind):
    kind = dict(kind)
    method = KD(Ids(), write(tmp_path, teacher, mode=kind.pop("mode", "topk")), **kind)
    runs = [
        train(
            teacher_of(seed=5).double(),
            method,
            ROWS,
            TrainConfig(
                max_steps=5,
                batch_size=8 // a,
                gradient_accumulation_steps=a,
                lr=3e-3,
                log_every=1,
                device="cpu",
            ),
        )
        for a in (1, 4)
    ]
    one, four = ([row["loss"] for row in run.history] for run in runs)
    assert one == pytest.approx(four, rel=1e-9)
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


def test_a_teacher_that_is_sure_of_the_target_makes_it_the_language_model_loss(teacher):
    "Off by one would show here: all mass on the target token at each target position."
    batch = SFT(Ids()).collate(ROWS[:5])
    logits, n = target_logits(teacher_of(seed=5), batch), len(target_positions(batch).ids)
    sure = topk_divergence(
        logits, target_positions(batch).ids[:, None], torch.zeros(n, 1), torch.full((n,), -math.inf)
    )
    torch.testing.assert_close(
        sure.mean(), torch.nn.functional.cross_entropy(logits, target_positions(batch).ids)
    )


def test_scale_t2_and_sft_weight(tmp_path, teacher):
    cache, student = write(tmp_path, teacher, temperature=2.0), teacher_of(seed=5)
    plain, scaled, mixed = (
        KD(Ids(), cache, **kind) for kind in (dict(), dict(scale_t2=True), dict(sft_weight=0.25))
    )
    batch = plain.collate([plain.encode(r) for r in ROWS[:4]])
    torch.testing.assert_close(
        scaled.loss_sums(student, batch)["kd"], 4 * plain.loss_sums(student, batch)["kd"]
    )
    both = mixed.loss_sums(student, batch)
    assert mixed.loss_weights == {"kd": 0.75, "sft": 0.25}
    torch.testing.assert_close(both["sft"], SFT(Ids()).loss_sums(student, batch)["loss"])


def test_text_examples_and_their_rows_agree(tmp_path):
    tok = load_mini_tokenizer()
    teacher, method = teacher_of(vocab=len(tok)), SFT(tok)
    examples = [{"id": i, "input": f"Question {i}:", "label": f" answer {i * i}"} for i in range(6)]
    cache = write_cache(tmp_path, teacher, tok, examples, k=16)
    kd = KD(tok, cache)
    assert [kd.encode(e)["id"] for e in examples] == [str(i) for i in range(6)]
    assert kd.num_tokens(kd.encode(examples[3])) == method.num_tokens(method.encode(examples[3]))
    with pytest.raises(UserError, match="encoded differently"):
        kd.encode(examples[0] | {"input": "Q: " + examples[0]["input"]})


def test_training_needs_the_cache_only(tmp_path):
    "A process of its own, in which no teacher exists: neither its folder nor a call that would load a model."
    teacher = teacher_of()
    teacher.save_pretrained(tmp_path / "teacher")
    cache = write(tmp_path / "cache", teacher)
    here = train(
        teacher_of(seed=5),
        KD(Ids(), cache),
        list(cache),
        TrainConfig(max_steps=4, batch_size=4, lr=3e-3, log_every=1, device="cpu"),
    )
    for path in (tmp_path / "teacher").iterdir():
        path.unlink()
    code = """
    import json, sys
    import torch, transformers
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from test_logit_cache import *
    built = []
    init = transformers.PreTrainedModel.__init__
    transformers.PreTrainedModel.__init__ = lambda self, *a, **k: (built.append(type(self).__name__), init(self, *a, **k))[1]
    transformers.PreTrainedModel.from_pretrained = None
    cache = LogitCache({cache!r}, tokenizer=Ids(), teacher={digest!r})
    config = TrainConfig(max_steps=4, batch_size=4, lr=3e-3, log_every=1, device="cpu")
    history = train(teacher_of(seed=5), KD(Ids(), cache), list(cache), config).history
    print(json.dumps([built, [row["loss"] for row in history]]))
    """
    from pathlib import Path

    out = python(
        code,
        tests=str(Path(__file__).parent),
        cache=str(tmp_path / "cache"),
        digest=weights_hash(teacher),
    )
    built, losses = json.loads(out.splitlines()[-1])
    assert built.count("LlamaForCausalLM") == 1, "only the student was built"
    assert losses == pytest.approx([row["loss"] for row in here.history], rel=1e-5)


def test_a_copy_for_another_process_opens_its_own_files(tmp_path, teacher):
    cache = write(tmp_path, teacher)
    before = cache.targets(["r0", "r9"])
    again = copy.deepcopy(cache).targets(["r0", "r9"])
    assert all(torch.equal(before[k], again[k]) for k in before)


def test_reading_is_streaming(tmp_path):
    "40 MB of cache in 20 files: reading in order and at random takes next to no memory of its own, and keeps few files open."
    teacher, rows = (
        teacher_of(vocab=2048),
        [
            {"id": str(i), "prompt": [2], "completion": [(7 * i + j) % 2000 + 4 for j in range(60)]}
            for i in range(60)
        ],
    )
    cache = write(tmp_path, teacher, rows, k=2048, dtype="float32", shard_tokens=180)
    size = sum(entry["bytes"] for entry in cache.index.values())
    code = """
    import random, re, sys
    import torch
    torch.set_num_threads(1)
    from kd_notes.methods.logit_cache import LogitCache
    def own():
        return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])/1e3
    cache = LogitCache({cache!r}, keep_open=4)
    cache.targets(["0"])
    names, start, most = list(cache.places), own(), 0.0
    for row in cache:
        most = max(most, own() - start)
    for i in range(200):
        cache.targets(random.Random(i).sample(names, 2))
        most = max(most, own() - start)
    print(most, len(cache._shards))
    """
    if sys.platform != "linux":
        pytest.skip("memory is read from /proc")
    most, still_open = map(float, python(code, cache=str(tmp_path)).split()[-2:])
    assert size > 40e6 and len(cache.index) == 20
    assert most < 15 and still_open == 4, (
        f"{most} MB of its own memory for {size / 1e6:.0f} MB of cache"
    )
