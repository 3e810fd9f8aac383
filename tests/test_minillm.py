"""MiniLLM and its relatives: expectations by enumeration, invariances, the buffer on the loop, kills and resumes, bad input."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kd_notes.methods.gkd as gkd_module
import kd_notes.experiments.instruction_world as instruction_world_module
import kd_notes.runner.code as code_module
from kd_notes.experiments.base import UNTRAINED
from kd_notes.experiments.instruction_world import InstructionWorld, WorldModels
from kd_notes.experiments.stepwise import Stepwise
from kd_notes.runner.grid import record_runs
import kd_notes.methods.minillm as minillm_module
import kd_notes.experiments.phases as phases_module
from kd_notes.core import read_jsonl, UserError
from kd_notes.losses.divergences import DIVERGENCES, forward_kl, jsd, token_divergence
from kd_notes.losses.families import skew_kl, skew_reverse_kl
from kd_notes.data.answers import unpack_numbers
from kd_notes.generation.sampling import log_mixture, sample, sample_mixed, Sampling
from kd_notes.methods.dpkd import DPKD, DPKDConfig
from kd_notes.methods.gkd import GKD, GKDConfig, Part, RECIPES, set_skew, skew_values
from kd_notes.methods.health import repeated_ngrams
from kd_notes.methods.minillm import (
    all_responses,
    exact_kl,
    MiniLLM,
    minillm_terms,
    MiniLLMConfig,
    PRESETS,
    returns_to_go,
    set_advantages,
    surrogate,
    token_rewards,
    whitened,
)
from kd_notes.methods.on_policy import minibatch_config, OnPolicy
from kd_notes.methods.registry import METHODS, onpolicy_method
from kd_notes.methods.rollouts import (
    check_drawn,
    Response,
    response_batch,
    RolloutRow,
    shuffled_pick,
    SOURCES,
    token_logprobs,
)
from kd_notes.runner.runs import read_manifest, run_folder, run_status
from kd_notes.training.batches import (
    causal_batch,
    target_logits,
    target_nll,
    target_positions,
)
from kd_notes.training.checkpoint import last_checkpoint
from kd_notes.training.loop import train
from kd_notes.training.state import Callback, TrainConfig
from kd_notes.data.world import answer_tokens, load_world, load_world_tokenizer, log_likelihood

torch.set_num_threads(1)
PROMPT = [1, 2]


class Ids:
    "For prompts that are ids already. As with GPT-2, padding is the end token."

    pad_token_id = eos_token_id = 0

    def encode(self, text, add_special_tokens=False):
        return [int(x) for x in text.split()]


def toy(seed, width=8, vocabulary=3, dtype=torch.float64, scale=0.4, positions=32):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    shape = dict(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=width,
        n_layer=1,
        n_head=2,
        initializer_range=scale,
    )
    return GPT2LMHeadModel(
        GPT2Config(
            **shape, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, bos_token_id=0, eos_token_id=0
        )
    ).to(dtype)


def vector(model, value):
    params = list(model.parameters())
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, params, materialize_grads=True)]
    )


def logs_of(model, tokens, prompt=PROMPT):
    return -target_nll(model, causal_batch([(prompt, tokens)], 0))


def plain(vocabulary, width):
    "GPT-2 whose blocks add nothing: all weights are 0."
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=32,
            n_embd=width,
            n_layer=1,
            n_head=1,
            tie_word_embeddings=False,
            embd_pdrop=0,
            attn_pdrop=0,
            resid_pdrop=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    for p in model.parameters():
        p.data.zero_()
    return model


def bigram(table):
    "A model whose next token depends on the last one only, with the probabilities of this table."
    model, eye = plain(len(table), 2 * len(table)), torch.eye(len(table))
    model.transformer.wte.weight.data = torch.cat([eye, -eye], 1)
    model.transformer.ln_f.weight.data.fill_(
        0.5 * (1 / len(table) + 1e-5) ** 0.5
    )  # makes it half of the embedding
    model.lm_head.weight.data = (
        torch.tensor(table).log().T @ model.transformer.wte.weight.data
    ).contiguous()
    return model


ROWS = [{"id": f"p{i}", "prompt": [1, 1 + i % 2], "response": [1 + i % 2, 1, 0]} for i in range(6)]


def method_of(cfg, teacher, kind=MiniLLM, **more):
    return kind(Ids(), teacher, cfg, **more)


def rows_of(responses, texts=None):
    "Responses as the loop's examples, one per row."
    return [RolloutRow([r], texts and texts[i % len(texts)]) for i, r in enumerate(responses)]


def in_use(method):
    "All responses of the rollout that a method uses."
    return [r for row in method.rollouts.responses for r in row]


# ---------------------------------------------------------------- expectations by enumeration

STEPS = 3
EVERY = all_responses(3, STEPS)
STUDENT, TEACHER = toy(0), toy(1, width=16)
EXACT = vector(STUDENT, exact_kl(STUDENT, TEACHER, PROMPT, EVERY))


def drawn(cfg, every=EVERY, student=STUDENT, teacher=TEACHER):
    "Each response as the sampler stores it, and its probability."
    out = []
    for tokens in every:
        q, p = logs_of(student, tokens).detach(), logs_of(teacher, tokens).detach()
        mix = (cfg.alpha * p.exp() + (1 - cfg.alpha) * q.exp()).log() if cfg.alpha else q
        out.append(
            Response("p0", PROMPT, tokens, "mixed", log_student=q, log_teacher=p, log_mix=mix)
        )
    chance = torch.tensor([math.exp(sum(r.log_mix)) for r in out], dtype=torch.float64)
    assert abs(chance.sum() - 1) < 1e-9
    return out, chance


def expected(preset="exact", every=EVERY, exact_of=None, **changes):
    "Expected gradient of the method's own `sums`, over all responses."
    cfg = MiniLLMConfig.preset(preset, **({"pt_weight": 0.0, "rollouts": len(every)} | changes))
    responses, chance = drawn(cfg, every)
    set_advantages(responses, cfg)
    method, total = method_of(cfg, TEACHER), 0
    for row, weight in zip(rows_of(responses), chance):
        batch = method.collate([row])
        counts, sums = method.token_counts(batch), method.loss_sums(STUDENT, batch)
        loss = sum(
            method.loss_weights[k] * sums[k] / counts[k] for k in sums if method.loss_weights[k]
        )
        total = total + weight * vector(STUDENT, loss)
    return total


def far(found, exact=EXACT):
    return ((found - exact).norm() / exact.norm()).item()


def test_listing_is_complete_and_the_exact_kl_is_a_kl():
    assert len(EVERY) == len(set(map(tuple, EVERY))) == 1 + 2 + 4 * 3
    assert len(all_responses(3, 2, stop=None)) == 9
    assert (
        exact_kl(STUDENT, TEACHER, PROMPT, EVERY) > 0
        and abs(exact_kl(STUDENT, STUDENT, PROMPT, EVERY)) < 1e-12
    )


def test_exact_gradient_by_finite_differences():
    "The reference itself, derived a second way."
    direction, model = (
        torch.nn.functional.normalize(torch.randn(len(EXACT), dtype=torch.float64), dim=0),
        toy(0),
    )
    start, values = torch.nn.utils.parameters_to_vector(model.parameters()).detach(), []
    for step in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(start + step * direction, model.parameters())
        values.append(exact_kl(model, TEACHER, PROMPT, EVERY).item())
    assert abs((values[0] - values[1]) / 2e-5 - EXACT @ direction) < 1e-7


@pytest.mark.parametrize("steps", [2, 3])
def test_single_plus_long_is_the_exact_sequence_gradient(steps):
    every = all_responses(3, steps)
    exact = vector(STUDENT, exact_kl(STUDENT, TEACHER, PROMPT, every))
    assert far(expected(every=every), exact) < 1e-10


def test_sampled_return_to_go_is_the_exact_gradient_too():
    assert far(expected(single_step=False, present_reward=True)) < 1e-10


def test_the_codes_variant_is_twice_single_plus_long():
    code = expected(present_reward=True)
    single = expected("on_policy", average="sum")
    assert far(code) > 0.05 and far(code - single) < 1e-10
    assert (
        far(
            expected(
                "official",
                average="sum",
                whiten="none",
                clip=0.0,
                pt_kd_ratio=0.0,
                alpha=0.0,
                length_norm=False,
            )
        )
        > 0.05
    )


def test_on_policy_distillation_is_the_single_step_part_and_not_the_sequence_gradient():
    opd, total = expected("on_policy", average="sum"), 0
    responses, chance = drawn(MiniLLMConfig.preset("exact"))
    for r, weight in zip(responses, chance):
        batch = response_batch([r], 0, torch.float64)
        with torch.no_grad():
            p = target_logits(TEACHER, batch)
        total = total + weight * vector(
            STUDENT, token_divergence("reverse_kl", target_logits(STUDENT, batch), p).sum()
        )
    assert far(opd, total) < 1e-10 and far(opd) > 0.01
    assert (
        far(expected("on_policy", average="sum", gamma=1.0)) < 1e-10
    )  # discount 1 restores the sequence


def test_trls_trainer_counts_the_single_step_part_twice():
    trl, opd = expected("trl", average="sum", clip=0.0), expected("on_policy", average="sum")
    assert far(trl, 2 * opd) < 1e-10
    three = Response(
        "a",
        [1],
        [1, 2, 1],
        "student",
        log_student=[-1.0] * 3,
        log_teacher=[-2.0, -3.0, -4.0],
        log_mix=[-1.0] * 3,
    )
    minillm_module.set_advantages([three], MiniLLMConfig.preset("trl"))
    assert list(three.advantage) == pytest.approx(
        [-1, -2, -3]
    )  # the rewards themselves, not divided by what is left


MIXED = dict(length_norm=False, clip=0.0, average="sum", inner_epochs=1)


@pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])
def test_exact_importance_weights_make_mixed_sampling_exact(alpha):
    assert far(expected("paper", importance="exact", alpha=alpha, **MIXED)) < 1e-9
    assert (
        far(expected("paper", importance="product", alpha=alpha, **MIXED)) > 1e-3
    )  # the future is the mixture's
    assert far(expected("paper", importance="token", alpha=alpha, **MIXED)) > 1e-3


def test_the_weight_on_the_single_step_part_has_no_effect_in_expectation():
    weighted, plain = expected("paper", **MIXED), expected("paper", weight_single=False, **MIXED)
    assert torch.allclose(weighted, plain, atol=1e-12)


def test_token_mean_of_responses_of_one_length_is_the_gradient_up_to_that_length():
    every = all_responses(3, 2, stop=None)
    exact = vector(STUDENT, exact_kl(STUDENT, TEACHER, PROMPT, every))
    assert far(2 * expected(every=every, average="tokens"), exact) < 1e-10


# ---------------------------------------------------------------- expectations by sampling


def largest_error(preset, n=4000, **changes):
    "Of the mean gradient of n responses that a training drew itself: the largest distance from the exact one, in standard errors."
    given = {
        "pt_weight": 0.0,
        "inner_epochs": 1,
        "rollouts": n,
        "max_new_tokens": STEPS,
        "sample_batch": n,
    }
    method = method_of(MiniLLMConfig.preset(preset, **(given | changes)), TEACHER)
    rows = [{"id": "p0", "prompt": PROMPT}]
    result, _ = go(
        method=method, rows=rows, student=toy(0), steps=1, lr=1e-12, minibatch=n, cfg={"seed": 1}
    )
    slots = {tuple(r.tokens): r for r in in_use(method)}
    often = Counter(tuple(r.tokens) for r in in_use(method))
    gradients = []
    for r in slots.values():
        batch = method.collate(rows_of([r]))
        counts, sums = method.token_counts(batch), method.loss_sums(STUDENT, batch)
        gradients.append(
            vector(
                STUDENT,
                sum(
                    method.loss_weights[k] * sums[k] / counts[k]
                    for k in sums
                    if method.loss_weights[k]
                ),
            )
        )
    each, share = (
        torch.stack(gradients),
        torch.tensor([often[tokens] / n for tokens in slots], dtype=torch.float64),
    )
    mean = share @ each
    assert result.history[0]["grad_norm"] == pytest.approx(
        mean.norm().item()
    )  # it is what the training steps along
    error = (share @ (each - mean) ** 2 / n).sqrt()
    return ((mean - EXACT).abs() / (error + 1e-9)).max().item()


CODE = dict(average="sum", whiten="none", clip=0.0, pt_kd_ratio=0.0, alpha=0.0, length_norm=False)


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("exact", {}),
        ("exact", dict(single_step=False, present_reward=True)),
        ("paper", dict(importance="exact", alpha=0.5, **MIXED)),
    ],
)
def test_sampled_gradients_scatter_around_the_exact_one(preset, changes):
    assert largest_error(preset, **changes) < 4.5


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("exact", dict(present_reward=True)),
        ("official", CODE),
        ("official", {"average": "sum"}),
        ("paper", dict(importance="token", alpha=0.5, **MIXED)),
    ],
)
def test_sampling_finds_the_bias_of_the_released_code_and_of_one_factor_weights(preset, changes):
    assert largest_error(preset, **changes) > 10


# ---------------------------------------------------------------- weights, returns, whitening, clipping


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
def test_weights_average_to_one_under_the_mixture(alpha):
    "The ratio q/p~ of every token of a vocabulary of 7, 50 times: its mean under p~ is 1, and it is never above 1/(1 - alpha)."
    generator = torch.Generator().manual_seed(0)
    z, t = (2 * torch.randn(50, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    q, p = z.softmax(-1), t.softmax(-1)
    log_mix, every = log_mixture(q.log(), p.log(), alpha), torch.arange(7).repeat(50)
    batch = {
        "target_ids": every,
        "log_mix": log_mix.flatten(),
        "advantage": torch.zeros(350),
        "prefix": torch.ones(350),
    }
    ratio = minillm_terms(
        z.repeat_interleave(7, 0), t.repeat_interleave(7, 0), batch, MiniLLMConfig(alpha=alpha)
    )["ratio"].view(50, 7)
    assert torch.allclose((log_mix.exp() * ratio).sum(-1), torch.ones(50, dtype=torch.float64))
    assert alpha == 1 or ratio.max() <= 1 / (1 - alpha) + 1e-12
    ends = {0.0: torch.ones(50, 7, dtype=torch.float64), 1.0: q / p}
    assert (
        torch.allclose(ratio, ends[alpha])
        if alpha in ends
        else ratio.min() < 0.9 and ratio.max() > 1.1
    )


def test_a_training_draws_from_the_student_alone_or_the_teacher_alone():
    for alpha, source in ((0.0, "student"), (1.0, "mixed")):
        result, method = go(steps=1, alpha=alpha, minibatch=16, inner_epochs=1)
        responses, first = (
            in_use(method),
            result.history[0],
        )
        assert {r.source for r in responses} == {source} and first[
            "teacher_share"
        ] == pytest.approx(alpha)
        for r in responses:
            own, theirs = (logs_of(m, r.tokens, r.prompt).tolist() for m in (small(), BIG))
            assert r.log_student == pytest.approx(own, abs=1e-4) and r.log_teacher == pytest.approx(
                theirs, abs=1e-4
            )
            assert r.log_mix == (r.log_teacher if alpha else r.log_student)
        weights = [
            math.exp(a - b) if alpha else 1.0
            for r in responses
            for a, b in zip(r.log_student, r.log_teacher)
        ]
        assert first["ratio"] == pytest.approx(sum(weights) / len(weights), rel=1e-4)


FIXTURE_P, FIXTURE_Q = (
    [0.643914, 0.236883, 0.087144, 0.032059],
    [0.167405, 0.455054, 0.276004, 0.101536],
)
FIXTURE_W = [0.637231, 1.106058, 1.158551, 1.158551]  # q/(0.2 p + 0.8 q), worked out by hand


def test_reference_weights_of_a_sampled_mixture():
    "Fixture 1, whatever was said before: weights and log-probabilities that the sampler keeps."
    made = sample_mixed(
        bigram([FIXTURE_Q] * 4), bigram([FIXTURE_P] * 4), [[1, 2]] * 60, 0.2, Sampling(3)
    )
    assert {t for tokens in made.response_ids for t in tokens} == {0, 1, 2, 3}
    mix = [0.262707, 0.411420, 0.238232, 0.087641]
    for name, values in (("log_student", FIXTURE_Q), ("log_teacher", FIXTURE_P), ("log_mix", mix)):
        found = [x.exp().tolist() for x in getattr(made, name)]
        assert found == [
            pytest.approx([values[t] for t in tokens], abs=2e-6) for tokens in made.response_ids
        ]
    assert made.importance().tolist() == pytest.approx(
        [FIXTURE_W[t] for tokens in made.response_ids for t in tokens], abs=1e-5
    )


def test_reference_terms_and_gradient():
    "Fixture 1, each of the four tokens: single part w*KL(q||p) and its gradient, surrogate clipped to 0.8 ... 1.2."
    t, z = (
        torch.tensor([[2.0, 1, 0, -1]]).double().expand(4, 4),
        torch.tensor([[0.0, 1, 0.5, -0.5]]).double().repeat(4, 1).requires_grad_(),
    )
    log_mix = torch.tensor([0.262707, 0.411420, 0.238232, 0.087641]).double().log()
    batch = {
        "target_ids": torch.arange(4),
        "log_mix": log_mix,
        "advantage": -torch.ones(4).double(),
        "prefix": torch.ones(4),
    }
    terms = minillm_terms(z, t, batch, MiniLLMConfig())
    assert terms["kl"].tolist() == pytest.approx([0.506811] * 4, abs=1e-6) and terms[
        "ratio"
    ].tolist() == pytest.approx(FIXTURE_W, abs=5e-6)
    assert terms["single"].tolist() == pytest.approx(
        [0.322956, 0.560562, 0.587166, 0.587166], abs=5e-6
    )
    assert terms["long"].tolist() == pytest.approx([0.8, *FIXTURE_W[1:]], abs=5e-6) and terms[
        "clipped"
    ].tolist() == [1, 0, 0, 0]
    [slope] = torch.autograd.grad(terms["single"][1], z)
    assert slope[1].tolist() == pytest.approx(
        [1.106058 * x for x in (-0.310362, 0.066456, 0.178310, 0.065597)], abs=5e-6
    )
    plain_kl = minillm_terms(
        z, t, batch | {"advantage": torch.ones(4).double()}, MiniLLMConfig(weight_single=False)
    )
    assert plain_kl["single"].tolist() == pytest.approx([0.506811] * 4, abs=1e-6)
    assert (
        plain_kl["long"].tolist() == pytest.approx([-w for w in FIXTURE_W], abs=5e-6)
        and not plain_kl["clipped"].any()
    )


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, [-0.902851, -1.152851, 0]),
        (dict(length_norm=False), [-1.805702, -1.152851, 0]),
        (dict(present_reward=True, length_norm=False, gamma=0.5), [0.732511, -1.229277, -1.152851]),
        (dict(importance="product"), [-0.902851, -0.734632, 0]),
        (dict(importance="exact", length_norm=False), [-2.199384, -0.851109, 0]),
    ],
    ids=str,
)
def test_reference_advantages(changes, expected):
    "Fixture 1, the response (0, 1, 2): rewards log p - log q are 1.347149, -0.652851 and -1.152851."
    logs = {
        "log_student": FIXTURE_Q,
        "log_teacher": FIXTURE_P,
        "log_mix": [0.262707, 0.411420, 0.238232],
    }
    row = Response(
        "a",
        [1],
        [0, 1, 2],
        "mixed",
        **{name: [math.log(x) for x in values[:3]] for name, values in logs.items()},
    )
    set_advantages([row], MiniLLMConfig(**changes))
    assert row.advantage == pytest.approx(expected, abs=1e-5) and row.prefix == pytest.approx(
        [1, 0.637231, 0.704814], abs=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=6), min_size=1, max_size=4),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
    st.integers(0, 4),
)
def test_returns_to_go_against_the_formula(rows, gamma, present, norm, extra):
    width = max(map(len, rows)) + extra
    rewards = torch.tensor([r + [0.0] * (width - len(r)) for r in rows], dtype=torch.float64)
    mask = torch.tensor(
        [[1.0] * len(r) + [0.0] * (width - len(r)) for r in rows], dtype=torch.float64
    )
    found = returns_to_go(rewards, mask, present=present, gamma=gamma, length_norm=norm)
    for b, r in enumerate(rows):
        for t in range(len(r)):
            part = r[t:] if present else r[t + 1 :]
            value = sum(gamma**i * x for i, x in enumerate(part)) / (
                max(len(part), 1) if norm else 1
            )
            assert abs(found[b, t] - value) < 1e-9
    assert (found * (1 - mask)).abs().sum() == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(0, 30))
def test_whitening_does_not_see_the_padding(seed, extra):
    torch.manual_seed(seed)
    mask = (torch.arange(6)[None] < torch.randint(1, 7, (5, 1))).double()
    values = torch.randn(5, 6, dtype=torch.float64) * mask
    wide, wide_mask = (
        torch.nn.functional.pad(values, (0, extra)),
        torch.nn.functional.pad(mask, (0, extra)),
    )
    wide = wide + (1 - wide_mask) * 99.0  # whatever lies under the padding
    found = whitened(wide, wide_mask)
    assert torch.allclose(found[:, :6], whitened(values, mask)) and found[:, 6:].abs().sum() == 0
    kept = whitened(values, mask)[mask > 0]
    assert abs(kept.mean()) < 1e-9 and (len(kept) < 2 or abs(kept.var(correction=0) - 1) < 1e-3)


def test_the_codes_whitening_depends_on_the_padding_and_ours_does_not():
    def advantages(whiten, longer):
        cfg = MiniLLMConfig(whiten=whiten, length_norm=False)
        rows = [
            Response(
                str(i),
                PROMPT,
                [1] * n,
                "mixed",
                log_student=[-1.0] * n,
                log_teacher=[-1.5 - i] * n,
                log_mix=[-1.0] * n,
            )
            for i, n in enumerate([3, 4] + [40] * longer)
        ]
        if longer:  # a neighbour without rewards: only its length counts
            rows[-1].log_teacher = rows[-1].log_student
        set_advantages(rows, cfg)
        return torch.tensor(rows[0].advantage), rows

    assert not torch.allclose(advantages("padded", 0)[0], advantages("padded", 1)[0][:3], atol=0.05)
    plain, rows = advantages("none", 0)
    padded = advantages("none", 1)[0]
    assert torch.equal(plain, padded)
    white, rows = advantages("responses", 0)
    values = torch.cat([torch.tensor(r.advantage) for r in rows])
    assert abs(values.mean()) < 1e-6 and abs(values.var(correction=0) - 1) < 1e-4


def test_equal_models_have_no_reward_and_no_gradient():
    for whiten in ("none", "responses", "padded"):
        cfg = MiniLLMConfig(whiten=whiten, pt_weight=0.0, rollouts=15)
        responses, _ = drawn(cfg, teacher=STUDENT)
        set_advantages(responses, cfg)
        assert all(abs(x) < 1e-9 for r in responses for x in r.advantage)
        method = method_of(cfg, toy(0))
        batch = method.collate(rows_of(responses))
        sums = method.loss_sums(STUDENT, batch)
        assert (
            abs(sums["kl"]) < 1e-12
            and abs(sums["reward"]) < 1e-9
            and vector(STUDENT, sums["single"] + sums["long"]).norm() < 1e-9
        )


def test_whitening_makes_the_reward_scale_irrelevant_except_through_the_clip():
    def advantages(**changes):
        responses, _ = drawn(MiniLLMConfig())
        set_advantages(responses, MiniLLMConfig(whiten="responses", **changes))
        return torch.cat([torch.tensor(r.advantage) for r in responses])

    assert torch.allclose(advantages(), advantages(reward_scale=2.0), atol=1e-6)
    assert not torch.allclose(
        advantages(reward_clip=0.5), advantages(reward_scale=2.0, reward_clip=0.5), atol=1e-3
    )


def test_clipping_starts_at_w_and_takes_the_gradient_of_what_the_student_dislikes():
    cfg = MiniLLMConfig(alpha=0.5, pt_weight=0.0)
    log_q, log_p = (
        torch.log(torch.tensor([[0.02, 0.98]]).double()),
        torch.log(torch.tensor([[0.9, 0.1]]).double()),
    )
    batch = {
        "target_ids": torch.tensor([0]),
        "log_mix": (0.5 * log_q.exp() + 0.5 * log_p.exp()).log()[:, 0],
        "advantage": torch.tensor([-1.0]),
        "prefix": torch.ones(1),
    }
    z = log_q.clone().requires_grad_()
    terms = minillm_terms(z, log_p, batch, cfg)
    assert terms["ratio"].item() == pytest.approx(0.02 / 0.46) and terms["clipped"].item() == 1
    assert torch.autograd.grad(terms["long"].sum(), z)[0].abs().sum() == 0
    terms = minillm_terms(z, log_p, batch | {"advantage": torch.tensor([1.0])}, cfg)
    assert (
        terms["clipped"].item() == 0
        and torch.autograd.grad(terms["long"].sum(), z)[0].abs().sum() > 0
    )


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 5), st.floats(-3, 3), st.floats(0.05, 0.5))
def test_surrogate_is_ppos(ratio, advantage, clip):
    found, clipped = surrogate(
        torch.tensor(ratio, dtype=torch.float64), torch.tensor(advantage, dtype=torch.float64), clip
    )
    limited = min(max(ratio, 1 - clip), 1 + clip)
    assert found.item() == pytest.approx(-min(ratio * advantage, limited * advantage))
    assert clipped.item() == float(ratio * advantage > limited * advantage)


# ---------------------------------------------------------------- batches: padding, prompts, neighbours, the end token


def some_responses(cfg):
    responses, _ = drawn(cfg)
    set_advantages(responses, cfg)
    return responses


@pytest.mark.parametrize("average", ["tokens", "responses", "sum"])
def test_neighbours_padding_and_accumulation_change_nothing(average):
    cfg = MiniLLMConfig(average=average, pt_weight=1.0, pt_kd_ratio=0.5, rollouts=15)
    corpus = [[1, 2, 1], [2, 2, 1, 1, 2, 2, 1, 0], [1, 1]]
    method = method_of(cfg, TEACHER, corpus=corpus)
    rows = rows_of(some_responses(cfg), corpus)

    def total(parts):
        found = {}
        for part in parts:
            batch = method.collate([rows[i] for i in part])
            for k, v in method.loss_sums(STUDENT, batch).items():
                found[k] = found.get(k, 0) + v
            for k, n in method.token_counts(batch).items():
                found["n " + k] = found.get("n " + k, 0) + n
        return found

    whole, single = total([list(range(15))]), total([[i] for i in range(15)])
    assert (
        whole.keys() == single.keys()
        and {"single", "long", "pt", "kl", "reward", "entropy", "clipped"} <= whole.keys()
    )
    for k in whole:
        assert abs(whole[k] - single[k]) < 1e-9, k


def test_what_lies_under_the_padding_has_no_influence():
    cfg = MiniLLMConfig(pt_weight=0.0, rollouts=15)
    method, responses = method_of(cfg, TEACHER), some_responses(cfg)
    batch = method.collate(rows_of(responses))
    poisoned = batch.map(torch.clone)
    used = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, r in enumerate(responses):
        used[row, : len(r.prompt) + len(r.tokens)] = True
    poisoned["input_ids"][~used] = 2
    before, after = method.loss_sums(STUDENT, batch), method.loss_sums(STUDENT, poisoned)
    assert (~used).any() and all(torch.allclose(before[k], after[k]) for k in before)


def test_prompt_logits_are_no_targets_and_the_end_token_is():
    "Padding is the end token here: the end that was drawn counts, what follows does not."
    r = Response("a", [1, 2, 1], [2, 0], "gold")
    batch = response_batch([r, Response("b", [1], [2, 1, 1, 0], "gold")], pad_id=0)
    width = batch["input_ids"].shape[1]
    index, ids = target_positions(batch)
    assert ids.tolist() == [2, 0, 2, 1, 1, 0]
    assert index.tolist() == [2, 3, width, width + 1, width + 2, width + 3]
    assert (
        batch.columns["row"].tolist() == [0, 0, 1, 1, 1, 1]
        and batch.columns["share"].tolist() == [0.5] * 2 + [0.25] * 4
    )


def test_off_by_one_a_teacher_that_knows_the_next_token():
    "Cross-entropy to a teacher that is certain of the gold token is the language-modelling loss."
    cfg = GKDConfig(source="gold", parts=(Part("cross_entropy"), Part("nll")), rollouts=6)
    method = method_of(cfg, TEACHER, GKD)
    batch = method.collate(rows_of(GOLD))
    logits = target_logits(STUDENT, batch)
    certain = torch.nn.functional.one_hot(target_positions(batch).ids, 3).double() * 200
    found = method.token_losses(logits, certain, batch.columns)
    assert torch.allclose(found["cross_entropy"], found["nll"])


def test_language_modelling_term():
    texts = [[1, 2, 1, 0], [2, 2]]
    for ratio in (0.0, 0.5, 1.0):
        cfg = MiniLLMConfig(pt_weight=1.0, pt_kd_ratio=ratio, rollouts=2)
        method = method_of(cfg, TEACHER, corpus=texts)
        batch = method.collate(rows_of(some_responses(MiniLLMConfig())[:2], texts))
        rows = causal_batch([(t[:1], t[1:]) for t in texts], 0)
        nll = target_nll(STUDENT, rows).sum()
        taught = token_divergence(
            "cross_entropy", target_logits(STUDENT, rows), target_logits(TEACHER, rows)
        ).sum()
        assert (
            torch.allclose(
                method.loss_sums(STUDENT, batch)["pt"], (1 - ratio) * nll + ratio * taught
            )
            and method.token_counts(batch)["pt"] == 4
        )


def test_canaries():
    assert (
        repeated_ngrams([1, 2, 3, 4, 5, 6]) == 0
        and repeated_ngrams([1] * 24) == pytest.approx(20 / 21)
        and repeated_ngrams([1, 2, 3]) == 0
    )
    good = [Response("a", [1], [1, 2, 0], "student"), Response("b", [1], [0], "student")]
    check_drawn(good)
    with pytest.raises(UserError, match="a, b.*collapsed to silence"):
        check_drawn([Response("a", [1], [0], "student"), Response("b", [1], [0], "student")])
    with pytest.raises(UserError, match="has no token"):
        check_drawn([Response("a", [1], [], "student")])
    check_drawn(
        [Response("a", [1], [5], "student", finished=False)]
    )  # cut off by length: a word, not silence


# ---------------------------------------------------------------- on the loop


def small(seed=5, dtype=torch.float32):
    return toy(seed, width=8, vocabulary=5, dtype=dtype)


BIG = toy(3, width=16, vocabulary=5, dtype=torch.float32)
CORPUS = [[1, 2, 3, 4, 1, 2], [3, 3, 1], [4, 2, 4, 2, 4, 2, 4, 2]]
SMALL = dict(rollouts=16, max_new_tokens=5)


def make(name="minillm", teacher=BIG, dtype=None, **changes):
    return onpolicy_method(
        name,
        Ids(),
        teacher if dtype is None else toy(3, 16, 5, dtype),
        corpus=CORPUS,
        **(SMALL | changes),
    )


def go(
    name="minillm",
    steps=10,
    student=None,
    lr=3e-3,
    run_dir=None,
    validate=None,
    callbacks=(),
    method=None,
    rows=ROWS,
    minibatch=8,
    batch_size=None,
    cfg=None,
    **changes,
):
    method = method or make(name, **changes)
    cfg = {"log_every": 1, "device": "cpu", "seed": 3} | (cfg or {})
    cfg = minibatch_config(minibatch, steps, lr, batch_size, **cfg)
    outputs = {"run_dir": run_dir, "validate": validate, "callbacks": callbacks}
    return train(student or small(), method, rows, cfg, **outputs), method


def terms(result, *names):
    return [[row[n] for n in names] for row in result.history if "loss" in row]


class Record(Callback):
    "The responses in use at each step."

    def __init__(self, method):
        self.method, self.seen = method, []

    def on_step(self, loop):
        self.seen.append(
            {
                place: [tuple(r.tokens) for r in row]
                for place, row in enumerate(self.method.rollouts.responses)
            }
        )


def test_a_cycle_uses_every_response_in_each_inner_epoch_then_draws_anew():
    method = make(inner_epochs=3)
    used, collate = [], method.collate
    method.collate = lambda items: (
        used.append([id(row.responses[0]) for row in items]) or collate(items)
    )
    watch = Record(method)
    go(method=method, steps=14, callbacks=[watch])
    for i in range(0, 14, 2):  # two minibatches are an inner epoch
        assert len(used[i]) == len(used[i + 1]) == 8
        assert len({*used[i], *used[i + 1]}) == 16
    for i in (0, 6):  # three inner epochs use one rollout
        assert {*used[i], *used[i + 1]} == {*used[i + 4], *used[i + 5]}
    assert (
        watch.seen[0] == watch.seen[5]
        and watch.seen[6] == watch.seen[11]
        and watch.seen[0] != watch.seen[6]
    )
    assert method.rollouts.drawn["mixed"] == sum(
        len(t)
        for seen in (watch.seen[0], watch.seen[6], watch.seen[12])
        for rows in seen.values()
        for t in rows
    )


def test_prompts_and_texts_go_round_before_they_repeat():
    picks = [shuffled_pick("prompts", 0, i, 6) for i in range(18)]
    assert (
        all(sorted(picks[i : i + 6]) == list(range(6)) for i in (0, 6, 12))
        and picks[:6] != picks[6:12]
    )
    method = make(rollouts=6)
    go(method=method, steps=1, minibatch=6)
    assert sorted(r.id for r in in_use(method)) == sorted(r["id"] for r in ROWS)


def test_accumulation_changes_no_number():
    a, _ = go(student=small(dtype=torch.float64), dtype=torch.float64, batch_size=8)
    b, _ = go(student=small(dtype=torch.float64), dtype=torch.float64, batch_size=2)
    names = (
        "loss",
        "single",
        "long",
        "pt",
        "kl",
        "reward",
        "clipped",
        "entropy",
        "length",
        "grad_norm",
    )
    torch.testing.assert_close(
        torch.tensor(terms(a, *names)), torch.tensor(terms(b, *names)), atol=1e-9, rtol=1e-9
    )


ONE_OF_TWO = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import test_minillm
    from accelerate import notebook_launcher
    notebook_launcher(test_minillm.one_of_two, (sys.argv[2],), num_processes=2, use_port=sys.argv[3])
"""


def doubled():
    "In float64: the bias of attention's keys has no gradient but rounding, and AdamW would make steps of it."
    return {"student": small(dtype=torch.float64), "dtype": torch.float64}


def one_of_two(folder):
    "What each of two processes does: a mini-batch of 8 in four parts, the responses of a buffer drawn by halves."
    from accelerate import PartialState
    from safetensors.torch import save_file

    for name in ("minillm", "gkd"):
        result, method = go(name, steps=6, batch_size=2, run_dir=f"{folder}/{name}", **doubled())
        assert PartialState().num_processes == 2
        rank = PartialState().process_index
        save_file(
            {k: v.detach().clone() for k, v in result.model.named_parameters()},
            f"{folder}/{name}-{rank}.safetensors",
        )
        with open(f"{folder}/{name}-{rank}.json", "w") as f:
            json.dump(
                [[r.tokens for r in row] for row in method.rollouts.responses],
                f,
            )
    method = make("seqkd")
    write = method.write
    method.write = lambda *args: (
        write(*args)
        if rank == 0
        else (_ for _ in ()).throw(UserError("NaN", where="example x", fix="Mend it."))
    )
    try:
        go(method=method, steps=1, batch_size=4)
    except UserError as e:
        open(f"{folder}/error-{rank}.txt", "w").write(str(e))


def test_two_processes_that_each_draw_a_half_equal_one_and_an_error_reaches_both(tmp_path):
    from safetensors.torch import load_file

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    argv = [
        sys.executable,
        "-c",
        textwrap.dedent(ONE_OF_TWO),
        os.path.dirname(__file__),
        str(tmp_path),
        port,
    ]
    cpu = {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(argv, env=os.environ | cpu, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("minillm", "gkd"):
        one, method = go(name, steps=6, **doubled())
        drawn_by = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        mine = [[r.tokens for r in row] for row in method.rollouts.responses]
        assert (
            drawn_by[0] == drawn_by[1] == mine and len(mine) == SMALL["rollouts"]
        )  # everybody holds all, and the same ones
        ranks = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2)]
        for key, p in one.model.named_parameters():
            assert torch.equal(ranks[0][key], ranks[1][key])
            torch.testing.assert_close(ranks[0][key], p.detach(), atol=1e-9, rtol=1e-7)
        logged = [r["loss"] for r in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in r]
        assert logged == pytest.approx([r["loss"] for r in one.history if "loss" in r], rel=1e-8)
    assert [(tmp_path / f"error-{rank}.txt").read_text() for rank in range(2)] == [
        "step 1, example x: NaN. Mend it."
    ] * 2


def test_logs_and_free_checks():
    result, method = go(steps=40, inner_epochs=1, lr=1e-5)
    names = (
        "reward",
        "kl",
        "length",
        "repetition",
        "clipped",
        "entropy",
        "teacher_share",
        "ratio",
        "finished",
        "overlap",
        "teacher_agrees",
        "teacher_logprob",
    )
    mean = dict(zip(names, torch.tensor(terms(result, *names)).mean(0).tolist()))
    assert (
        abs(mean["teacher_share"] - 0.2) < 0.02
        and abs(mean["ratio"] - 1) < 0.02
        and mean["kl"] > 0
        and 1 <= mean["length"] <= 5
    )
    assert result.tokens > sum(len(r.prompt) + len(r.tokens) for r in in_use(method))
    assert 0 < mean["overlap"] <= 1 and 0 <= mean["teacher_agrees"] <= 1
    assert -100 <= mean["teacher_logprob"] < 0


# A weak student: all it can learn is one number, which raises the logits of some tokens.


def one_number(direction, value):
    model = plain(len(direction), 1).requires_grad_(False)
    model.lm_head.weight.data, model.transformer.ln_f.bias.data = (
        torch.tensor(direction)[:, None].float(),
        torch.tensor([value]),
    )
    model.transformer.ln_f.bias.requires_grad_(True)
    return model


class Watch(Callback):
    "Canaries of the responses in use and of the student before each step, by plain counting."

    def __init__(self, method):
        self.method, self.seen = method, []

    def on_start(self, loop):
        self.before = loop.model.transformer.ln_f.bias.item()

    def on_step(self, loop):
        rows = in_use(self.method)
        p = torch.softmax(self.before * loop.model.lm_head.weight[:, 0], 0)
        grams = [[r.tokens[i : i + 4] for i in range(len(r.tokens) - 3)] for r in rows]
        looped = [sum(g in had[:i] for i, g in enumerate(had)) / max(len(had), 1) for had in grams]
        self.seen.append(
            {
                "length": sum(len(r.tokens) for r in rows) / len(rows),
                "finished": sum(r.tokens[-1] == 0 for r in rows) / len(rows),
                "repetition": sum(looped) / len(rows),
                "entropy": -(p * p.log()).sum().item(),
            }
        )
        self.before = loop.model.transformer.ln_f.bias.item()


def watched_run(direction, value, teacher, steps=40, lr=0.1, run_dir=None, cfg=None, **changes):
    "{canary: its logged values}, after they were compared with plain counting."
    given = dict(teacher=teacher, pt_weight=0.0, rollouts=32, max_new_tokens=16, inner_epochs=1)
    method = make(**(given | changes))
    watch = Watch(method)
    result, _ = go(
        method=method,
        student=one_number(direction, value),
        minibatch=method.config.rollouts,
        steps=steps,
        lr=lr,
        callbacks=[watch],
        run_dir=run_dir,
        cfg=cfg,
    )
    logged = {
        name: [row[name] for row in result.history]
        for name in ("length", "finished", "repetition", "entropy")
    }
    for name, values in logged.items():
        assert values == pytest.approx([row[name] for row in watch.seen], abs=1e-5), name
    return logged


SHORT = [1.0, 0, 0, 0, 0]  # the number is the logit of the end; the words stay equally likely


def test_without_length_norm_and_mixing_a_weak_student_grows_short_in_the_log():
    "Every word costs it reward, as it cannot choose words like its teacher. Each stabiliser keeps it from falling silent."

    def end(**changes):
        logged = watched_run(SHORT, -1.0, bigram([[0.05, 0.8, 0.05, 0.05, 0.05]] * 5), **changes)
        assert logged["length"][0] > 7
        return np.mean(logged["length"][-10:]), np.mean(logged["finished"][-10:])

    full, no_mixing, no_norm = end()[0], end(alpha=0.0)[0], end(length_norm=False)[0]
    neither, finished = end(alpha=0.0, length_norm=False)
    assert neither + 0.5 < min(no_mixing, no_norm) and max(no_mixing, no_norm) + 1.5 < full
    assert neither < 2.5 and full > 5 and finished == 1


def test_a_collapse_is_stopped_with_step_and_examples_and_the_log_shows_how_it_came(tmp_path):
    hack = dict(alpha=0.0, length_norm=False, rollouts=16)
    with pytest.raises(
        UserError,
        match=r"step \d+, example p\d.*16 responses are empty.*collapsed to silence.*length_norm",
    ) as caught:
        watched_run(
            SHORT,
            -1.0,
            bigram([[0.05, 0.92, 0.01, 0.01, 0.01]] * 5),
            steps=80,
            lr=0.2,
            run_dir=tmp_path,
            cfg={"save_every": 50},
            **hack,
        )
    step = int(str(caught.value).split("step ")[1].split(",")[0])
    log = read_jsonl(tmp_path / "metrics.jsonl")
    assert (
        [row["step"] for row in log] == list(range(1, step))
        and log[0]["length"] > 7
        and np.mean([row["length"] for row in log[-5:]]) < 1.6
    )
    assert (
        log[0]["finished"] < 0.9
        and log[-1]["finished"] == 1
        and log[-1]["entropy"] < 0.6 * log[0]["entropy"]
    )
    assert last_checkpoint(tmp_path).name == f"step-{step - 1:07d}"


LOOPS = [
    [1e-4, 0.2499, 0.25, 0.25, 0.25],
    [1e-4, 0.9699, 0.01, 0.01, 0.01],  # after word 1 comes word 1
    [1e-4, 0.05, 0.05, 0.8499, 0.05],
    [1e-4, 0.05, 0.05, 0.05, 0.8499],
    [1e-4, 0.05, 0.8499, 0.05, 0.05],
]


def test_without_mixing_a_weak_student_learns_to_loop_where_its_teacher_trusts_loops_and_the_log_says_so():
    "All that it can learn is to say word 1 more often and to end more rarely. A teacher that does not trust loops is the control."
    looping = watched_run([-4.0, 1, 0, 0, 0], 0.5, bigram(LOOPS), alpha=0.0)
    assert (
        looping["repetition"][0] < 0.1
        and np.mean(looping["repetition"][-5:]) > 0.5
        and looping["finished"][-1] == 0
    )
    assert looping["entropy"][-1] < 0.4 * looping["entropy"][0] and looping["length"][-1] == 16
    sober = watched_run([-4.0, 1, 0, 0, 0], 0.5, bigram([LOOPS[0]] * 5), alpha=0.0)
    assert max(sober["repetition"]) < 0.15 and sober["entropy"][-1] > 0.8 * sober["entropy"][0]


def test_mini_llm_lowers_the_exact_reverse_kl():
    every = all_responses(5, 3)

    def measured(model):
        return sum(exact_kl(model, BIG, p["prompt"], every).item() for p in ROWS[:2])

    before = measured(small())
    for name in ("minillm", "on_policy", "on_policy_kd"):
        result, _ = go(
            name,
            steps=60,
            lr=1e-2,
            max_new_tokens=3,
            inner_epochs=2 if name == "minillm" else 1,
            pt_weight=0.0,
        )
        assert measured(result.model) < 0.5 * before, name


def test_another_seed_is_another_training_and_the_same_seed_the_same():
    a, b, c = (go(steps=4, cfg={"seed": s})[0] for s in (1, 1, 2))
    assert terms(a, "loss") == terms(b, "loss") != terms(c, "loss")


SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    from test_minillm import go, whole_run
    from kd_notes.training.state import Callback
    class Plug(Callback):
        def on_step(self, loop):
            if loop.step == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)
    whole_run(sys.argv[4], sys.argv[2], [Plug()])
"""


def worse(model):
    "A validation loss that rises by a fifth each time, so that DistiLLM lets the student write."
    worse.loss += 0.2
    return {"score": -worse.loss, "loss": worse.loss}


worse.loss = 1.0


def whole_run(name, folder=None, callbacks=()):
    worse.loss = 1.0
    changes = dict(inner_epochs=3) if name == "minillm" else dict(capacity=40)
    return go(
        name,
        steps=22,
        run_dir=folder,
        callbacks=callbacks,
        validate=worse,
        cfg={"save_every": 5, "eval_every": 1, "log_every": 1},
        **changes,
    )


@pytest.mark.parametrize("name", ["minillm", "distillm"])
def test_kill_9_in_the_middle_of_a_cycle_then_resume_is_bit_identical(tmp_path, name):
    script = [
        sys.executable,
        "-c",
        textwrap.dedent(SCRIPT),
        os.path.dirname(__file__),
        str(tmp_path),
        "13",
        name,
    ]
    assert (
        subprocess.run(script, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120).returncode
        == -signal.SIGKILL
    )
    assert last_checkpoint(tmp_path).name == "step-0000010"  # in the second cycle of 6 steps
    whole, other = whole_run(name)
    worse.loss = 3.0  # the validations of the first ten steps are in the checkpoint
    resumed, method = go(
        name,
        steps=22,
        run_dir=tmp_path,
        validate=worse,
        cfg={"save_every": 5, "eval_every": 1, "log_every": 1},
        **(dict(inner_epochs=3) if name == "minillm" else dict(capacity=40)),
    )

    def clean(r):
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "score", "validation")}
            for row in r.history
        ]

    assert clean(whole) == clean(resumed) and method.rollouts.drawn == other.rollouts.drawn
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values())
    )
    if name == "distillm":
        assert (
            method.phi == other.phi > 0
            and [r.tokens for r in method.replay] == [r.tokens for r in other.replay] != []
        )


def test_a_checkpoint_of_other_prompts_or_settings_is_refused(tmp_path):
    go(steps=4, run_dir=tmp_path, cfg={"save_every": 2})
    with pytest.raises(UserError, match="a run with other method"):
        go(steps=4, run_dir=tmp_path, cfg={"save_every": 2}, alpha=0.3)


@pytest.mark.parametrize("name", ["minillm", "gkd"])
def test_a_checkpoint_is_not_continued_under_another_teacher(tmp_path, name):
    go(name, steps=4, run_dir=tmp_path, cfg={"save_every": 2})
    other = toy(3, width=16, vocabulary=5, dtype=torch.float32)
    go(
        name, steps=4, run_dir=tmp_path, cfg={"save_every": 2}, teacher=other
    )  # another object with the same weights: goes on
    with torch.no_grad():
        other.transformer.wte.weight[0, 0] += 0.25
    with pytest.raises(UserError, match="a run with other method"):
        go(name, steps=4, run_dir=tmp_path, cfg={"save_every": 2}, method=make(name, teacher=other))


# ---------------------------------------------------------------- the relatives


def values(method, responses, student=None):
    batch = method.collate(rows_of(responses))
    return method.loss_sums(student or small(), batch), method.token_counts(batch), batch


GOLD = [Response(r["id"], r["prompt"], r["response"], "gold") for r in ROWS]


def test_gkd_without_the_students_words_is_supervised_kd():
    method = make("gkd", share=0.0, parts=(Part("forward_kl"),), rollouts=6)
    assert {method.sources(s, c) for s in range(6) for c in range(20)} == {("gold",)}
    sums, counts, batch = values(method, GOLD)
    found = sums["forward_kl"] / counts["forward_kl"]
    logits = target_logits(small(), batch), target_logits(BIG, batch)
    torch.testing.assert_close(found, forward_kl(*logits))
    sums, counts, _ = values(make("gkd", parts=(Part("jsd", options={"beta": 0.1}),)), GOLD)
    torch.testing.assert_close(sums["jsd"] / counts["jsd"], jsd(*logits, beta=0.1))


def test_a_part_of_one_source_needs_a_coin_by_example():
    parts = [{"divergence": "nll", "source": "gold"}, {"divergence": "reverse_kl"}]
    with pytest.raises(UserError, match="no tokens for the parts of gold"):
        make("gkd", share=0.5, parts=parts)
    by_example = make("gkd", share=0.5, parts=parts, coin="example")
    assert {part.source for part in by_example.config.parts} == {"gold", "any"}


def test_gkds_coin_is_tossed_per_batch_or_per_example():
    batch = make("gkd", share=0.3)
    assert all(len({batch.sources(s, c) for s in range(16)}) == 1 for c in range(50))
    each = make("gkd", share=0.3, coin="example")
    shares = [each.sources(s, c) == ("student",) for s in range(16) for c in range(100)]
    assert abs(sum(shares) / 1600 - 0.3) < 0.04
    assert {make("gkd", share=1.0).sources(s, 0) for s in range(16)} == {("student",)}


def test_average_over_responses_is_the_mean_of_means():
    method = make("gkd", average="responses", parts=(Part("forward_kl"),))
    rows = [Response("p0", [1], [2, 0], "gold"), Response("p1", [1, 2], [3, 1, 4, 1, 0], "gold")]
    sums, counts, batch = values(method, rows)
    each = token_divergence("forward_kl", target_logits(small(), batch), target_logits(BIG, batch))
    torch.testing.assert_close(
        sums["forward_kl"] / counts["forward_kl"], (each[:2].mean() + each[2:].mean()) / 2
    )


def pair(tokens=(2, 3, 0)):
    return [Response("p0", [1, 2], tokens, "teacher"), Response("p0", [1, 2], tokens, "student")]


def in_pairs(method, responses):
    batch = method.collate([RolloutRow(responses[i : i + 2]) for i in range(0, len(responses), 2)])
    return method.loss_sums(small(), batch), method.token_counts(batch), batch


def test_f_distill_and_distillm2_on_identical_responses():
    method = make("fdistill_js", rollouts=1)
    sums, counts, batch = in_pairs(method, pair())
    logits = target_logits(small(), batch)[:3], target_logits(BIG, batch)[:3]
    loss = sum(method.loss_weights[k] * sums[k] / counts[k] for k in method.terms())
    torch.testing.assert_close(loss, jsd(*logits))
    method = make("distillm2", rollouts=1)
    sums, counts, _ = in_pairs(method, pair())
    loss = sum(method.loss_weights[k] * sums[k] / counts[k] for k in method.terms())
    torch.testing.assert_close(
        loss, skew_kl(*logits, alpha=0.1) + skew_reverse_kl(*logits, alpha=0.1)
    )
    method = make("fdistill_tvd", rollouts=1)
    sums, counts, _ = in_pairs(method, pair())
    loss = sum(method.loss_weights[k] * sums[k] / counts[k] for k in method.terms())
    torch.testing.assert_close(loss, token_divergence("total_variation", *logits).mean())


def test_a_part_sees_its_own_source_only():
    method = make("distillm2", rollouts=1)
    teacher_row, student_row = (
        Response("p0", [1, 2], [2, 3, 0], "teacher"),
        Response("p0", [1, 2], [4, 4, 4, 4, 0], "student"),
    )
    sums, counts, batch = in_pairs(method, [teacher_row, student_row])
    logits = target_logits(small(), batch), target_logits(BIG, batch)
    torch.testing.assert_close(sums["skew_kl_teacher"], skew_kl(logits[0][:3], logits[1][:3]))
    torch.testing.assert_close(
        sums["skew_reverse_kl_student"], skew_reverse_kl(logits[0][3:], logits[1][3:])
    )
    assert counts["skew_kl_teacher"] == counts["skew_reverse_kl_student"] == 1


def test_distillm2s_own_skew_and_ramp():
    method = make("distillm2", own_skew=True, ramp=True, rollouts=2)
    rows = pair() + [
        Response("p1", [1], [4, 0], "teacher"),
        Response("p1", [1], [3, 3, 0], "student"),
    ]
    set_skew(rows, small(), method)
    assert all(0.01 <= r.skew <= 0.1 for r in rows)
    assert set(method.reference_gap) == {"teacher", "student"}
    go(method=method, steps=3, minibatch=2)
    same = skew_values(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0.1, 0.01]), True)
    assert same.abs().max() < 1e-6


def test_distillm_starts_with_gold_and_hands_over_when_validation_worsens():
    method = make("distillm", capacity=20)
    method.step, method.total_steps = 0, 100
    assert {method.sources(0, c) for c in range(200)} == {("gold",)}
    for loss in (1.0, 1.05, 1.15, 1.2, 1.3):
        method.on_validate(None, {"score": -loss, "loss": loss})
    assert method.phi == pytest.approx(0.2)  # at 1.15 and at 1.3: 0.1 above the last rise
    method.phi = 0.6
    assert {method.sources(0, c) for c in range(200)} == {
        ("gold",),
        ("student",),
    }  # an empty buffer is filled first
    method.replay = [Response("p0", [1], [2], "student")] * 20
    method.step = 50
    drawn_from = [method.sources(0, c)[0] for c in range(2000)]
    assert (
        abs(drawn_from.count("student") / 2000 - 0.3) < 0.05
        and abs(drawn_from.count("replay") / 2000 - 0.3) < 0.05
    )
    method.on_rollout([Response("p1", [1], [i], "student") for i in range(30)], None)
    assert [r.tokens for r in method.replay] == [[i] for i in range(10, 30)]  # first in, first out


def test_dpkd():
    method = make("dpkd", rollouts=1, teacher=small())
    rows = [Response("p0", [1, 2], [2, 3, 0], "teacher"), Response("p0", [1, 2], [4, 0], "student")]
    sums, counts, _ = in_pairs(method, rows)
    assert counts["dpo"] == 1 and sums["dpo"].item() == pytest.approx(
        math.log(2), abs=1e-5
    )  # student = teacher: no preference yet
    method = make("dpkd", rollouts=1, beta=0.7)
    sums, counts, _ = in_pairs(method, rows)
    gap = [
        (logs_of(small(), r.tokens, r.prompt) - logs_of(BIG, r.tokens, r.prompt)).mean()
        for r in rows
    ]
    torch.testing.assert_close(
        sums["dpo"], -torch.nn.functional.logsigmoid(0.7 * (gap[0] - gap[1]))
    )


def test_dpkds_code_variant_is_constant_where_both_agree():
    method = DPKD(Ids(), small(), DPKDConfig.official(rollouts=6, pt_weight=0.0))
    student = small()
    batch = method.collate(rows_of(GOLD))
    sums = method.loss_sums(student, batch)
    assert sums["dpo"].item() / method.token_counts(batch)["dpo"] == pytest.approx(
        math.log(2), abs=1e-6
    )
    assert (
        vector(student, sums["dpo"]).abs().max() == 0
        and method.loss_weights["nll"] == method.loss_weights["dpo"] == 0.5
    )


def test_dpkds_code_variant_has_a_language_modelling_term_that_is_half_distilled():
    result, method = go("dpkd_official", steps=2)
    assert {k: v for k, v in method.loss_weights.items() if v} == {
        "dpo": 0.5,
        "nll": 0.5,
        "pt": 0.5,
    } and method.config.pt_kd_ratio == 0.5
    for row in result.history:
        if "loss" in row:
            assert (
                row["loss"] == pytest.approx(0.5 * (row["dpo"] + row["nll"] + row["pt"]), rel=1e-5)
                and row["pt"] > 0
            )
    with pytest.raises(UserError, match="corpus"):
        DPKD(Ids(), small(), DPKDConfig.official(rollouts=6))


@pytest.mark.parametrize("name", [*METHODS])
def test_every_method_trains(name):
    result, method = go(name, steps=3)
    assert (
        all(math.isfinite(row["loss"]) for row in result.history if "loss" in row)
        and result.steps == 3
    )
    assert set(method.rollouts.drawn) <= set(SOURCES)


# ---------------------------------------------------------------- settings and bad input


def test_what_is_not_trained_has_no_learning_rate():
    "Else a new choice of rates would make other runs of the teacher and the start."
    assert [WORLD.parameters(arm=arm, seed=0)["lr"] for arm in UNTRAINED] == [0.0, 0.0]
    assert (
        WORLD.parameters(arm="gkd", seed=0)["lr"] > 0
        and WORLD.parameters(arm="gkd", seed=0, lr=0.5)["lr"] == 0.5
    )


def test_presets_and_recipes():
    code = MiniLLMConfig.preset("official")
    assert (
        code.present_reward,
        code.weight_single,
        code.gamma,
        code.whiten,
        code.reward_scale,
        code.reward_clip,
        code.pt_kd_ratio,
        code.eval_no_repeat_ngram,
    ) == (True, False, 0.95, "padded", 2.0, 100.0, 0.5, 6)
    for name in PRESETS:
        MiniLLMConfig.preset(name)
    for name in RECIPES:
        GKDConfig.recipe(name)
    cfg = minibatch_config(64, 5000, batch_size=16)
    assert (
        cfg.batch_size * cfg.gradient_accumulation_steps,
        cfg.lr,
        tuple(cfg.betas),
        cfg.weight_decay,
        cfg.schedule,
        cfg.warmup,
    ) == (64, 5e-6, (0.9, 0.95), 1e-6, "constant", 100)


@pytest.mark.parametrize(
    "change",
    [
        {"rollouts": 0},
        {"inner_epochs": 0},
        {"average": "mean"},
        {"alpha": 1.1},
        {"clip": -0.1},
        {"whiten": "yes"},
        {"importance": "none"},
        {"gamma": 2.0},
        {"pt_kd_ratio": 1.5},
        {"temperature": 0.7},
        {"top_p": 0.9},
    ],
)
def test_impossible_settings_name_themselves(change):
    with pytest.raises(UserError, match=next(iter(change))):
        MiniLLMConfig(**change)


def test_unknown_names_list_the_choices():
    for call in (
        lambda: MiniLLMConfig.preset("ppo"),
        lambda: GKDConfig.recipe("dks"),
        lambda: onpolicy_method("x", Ids(), BIG),
    ):
        with pytest.raises(UserError, match="Choose one of"):
            call()
    with pytest.raises(UserError, match="alhpa"):
        make(alhpa=0.2)


def test_bad_rows_are_named():
    with pytest.raises(UserError, match="example 7.*prompt is empty"):
        go(rows=[{"id": "7", "prompt": []}], steps=1)
    with pytest.raises(UserError, match="no training examples"):
        go(rows=[], steps=1)
    with pytest.raises(UserError, match="example bare"):
        go("sft", rows=[{"id": "bare", "prompt": [1]}], steps=1)
    with pytest.raises(UserError, match="pt_weight=0"):
        onpolicy_method("minillm", Ids(), BIG)


def test_what_does_not_fit_is_said_before_the_first_step():
    with pytest.raises(UserError, match="rollout of 16 is no whole number of minibatches of 6"):
        go(steps=1, minibatch=6)
    with pytest.raises(UserError, match="example far"):
        go(rows=[*ROWS, {"id": "far", "prompt": [1] * 30}], steps=1)
    with pytest.raises(UserError, match="5 outputs, the teacher 9"):
        go(method=make(teacher=toy(1, vocabulary=9, dtype=torch.float32)), steps=1)


def test_a_teacher_whose_tokenizer_differs_is_refused():
    from kd_notes.models.mini import load_mini_tokenizer

    other = type("Other", (), {"get_vocab": lambda self: {"a": 0, "b": 1}})()
    with pytest.raises(UserError, match="tokenizers"):
        onpolicy_method(
            "minillm",
            load_mini_tokenizer(),
            BIG,
            corpus=CORPUS,
            teacher_tokenizer=other,
        )


def test_a_reward_that_is_not_finite_stops_with_step_and_ids(tmp_path):
    broken = toy(3, 16, 5, torch.float32)

    class Break(Callback):
        def on_step(self, loop):
            if loop.step == 4:
                broken.transformer.wte.weight.data[3] = math.nan

    with pytest.raises(UserError, match=r"step 5, example [a-z]\w*.*reward.*not finite"):
        go(
            method=make(alpha=0.0, inner_epochs=2, teacher=broken),
            steps=10,
            run_dir=tmp_path,
            callbacks=[Break()],
            cfg={"save_every": 3},
        )
    assert (
        last_checkpoint(tmp_path).name == "step-0000004"
    )  # nothing lost: not even the step after the last checkpoint
    rows = [
        Response(
            "good",
            [1],
            [1, 2],
            "mixed",
            log_student=[-1.0, -1.0],
            log_teacher=[-1.0, -2.0],
            log_mix=[-1.0, -1.0],
        ),
        Response(
            "bad",
            [1],
            [1, 2],
            "mixed",
            log_student=[-1.0, -1.0],
            log_teacher=[-1.0, -math.inf],
            log_mix=[-1.0, -1.0],
        ),
    ]
    with pytest.raises(UserError, match="example bad"):
        token_rewards(rows, MiniLLMConfig())
    assert token_rewards(rows, MiniLLMConfig(reward_clip=100.0)).min() == -100


@pytest.mark.parametrize("name", ["minillm", "seqkd", "skd"])
def test_a_teacher_that_computes_nan_stops_the_drawing_with_step_and_examples(name):
    broken = toy(3, 16, 5, torch.float32)

    class Break(Callback):
        def on_step(self, loop):
            if loop.step == 4:
                broken.transformer.wte.weight.data.fill_(math.nan)

    with pytest.raises(UserError, match=r"step 5, example [a-z]\w*.*NaN") as caught:
        go(method=make(name, inner_epochs=2, teacher=broken), steps=10, callbacks=[Break()])
    assert any(row["id"] in str(caught.value) for row in ROWS) and "prompt" not in str(
        caught.value.where
    )


def test_a_loss_that_is_not_finite_names_the_prompts_not_the_places_in_the_buffer():
    broken = toy(3, 16, 5, torch.float32)

    class Break(Callback):
        def on_step(self, loop):
            if loop.step == 5:  # in mid-cycle: these responses were drawn before
                broken.transformer.wte.weight.data.fill_(math.nan)

    with pytest.raises(UserError, match="not finite at step 6") as caught:
        go(
            method=make("on_policy_kd", inner_epochs=4, teacher=broken),
            steps=10,
            callbacks=[Break()],
        )
    assert any(row["id"] in str(caught.value) for row in ROWS)


def test_dropout_does_not_decide_how_skewed_a_mixture_is():
    method = make("distillm2", own_skew=True)
    student = small()
    for block in student.modules():
        if isinstance(block, torch.nn.Dropout):
            block.p = 0.5
    student.train()
    rows = [
        Response(f"r{i}", [1], [1, 2, 3], source)
        for i in range(3)
        for source in ("teacher", "student")
    ]
    found = []
    for _ in range(2):
        gkd_module.set_skew(rows, student, method)
        found.append([r.skew for r in rows])
    assert found[0] == found[1] and student.training


def test_two_parts_of_one_name_are_refused():
    parts = (Part("jsd", options={"beta": 0.1}), Part("jsd", options={"beta": 0.9}))
    with pytest.raises(UserError, match="two parts are called"):
        GKDConfig(**SMALL, parts=parts)


def test_an_empty_gold_response_is_found_before_the_first_step():
    steps = []
    watch = type("Watch", (Callback,), {"on_step": lambda self, loop: steps.append(loop.step)})()
    rows = [
        *[{"id": f"full{i}", "prompt": [1, 2], "response": [3, 1]} for i in range(40)],
        {"id": "bare", "prompt": [1]},
    ]
    with pytest.raises(UserError, match="example bare"):
        go("sft", rows=rows, teacher=None, steps=1, callbacks=[watch])
    assert not steps


FULL = [{"id": f"full{i}", "prompt": [1, 2], "response": [3, 1]} for i in range(8)]
UNFIT = {
    "empty": ({"prompt": [1], "response": []}, "no response"),
    "absent": ({"prompt": [1]}, "no response"),
    "long": ({"prompt": [1] * 40, "response": [1]}, "context of"),
    "foreign": ({"prompt": [1, 77], "response": [1]}, "tokens beyond the 5"),
}


@pytest.mark.parametrize("part", ["rows", "valid"])
@pytest.mark.parametrize("kind", UNFIT)
def test_phases_1_and_2_name_examples_that_cannot_be_used_before_the_first_step(kind, part):
    bad, words = UNFIT[kind]
    sets = {"rows": FULL, "valid": FULL} | {part: [*FULL, {"id": "bad"} | bad]}
    steps = []
    watch = type("Watch", (Callback,), {"on_step": lambda self, loop: steps.append(loop.step)})()
    with pytest.raises(UserError, match=words) as caught:
        phases_module.finetune(
            small(),
            Ids(),
            **sets,
            cfg=TrainConfig(max_steps=1, batch_size=2, lr=1e-3, device="cpu"),
            callbacks=[watch],
        )
    assert "example bad" in str(caught.value) and not steps


def test_a_loss_over_no_token_is_an_error():
    with pytest.raises(UserError, match="no target token"):
        phases_module.mean_nll(small(), [([1], [])], 0)


def test_prompts_and_texts_of_another_tokenizer_are_named():
    with pytest.raises(UserError, match="example strange"):
        go(rows=[*ROWS, {"id": "strange", "prompt": [5]}], steps=1)
    with pytest.raises(UserError, match="of the corpus, text 3"):
        method = onpolicy_method("minillm", Ids(), BIG, corpus=[*CORPUS, [1, 9]], **SMALL)
        go(method=method, steps=1)


@pytest.mark.parametrize("name", ["kd", "minillm"])
def test_what_a_training_does_not_read_may_be_long(name):
    # Of the completion, max_new_tokens are read.
    rows = [*ROWS, {"id": "long", "prompt": [1, 2], "response": [3] * 60}]
    rows = [r | {"response": r.get("response") or [3, 1]} for r in rows]

    def method(pt_weight):
        settings = SMALL | {"pt_weight": pt_weight}
        return onpolicy_method(name, Ids(), BIG, corpus=[*CORPUS, [1] * 60], **settings)

    history = go(method=method(0.0), rows=rows, steps=1)[0].history
    assert [r["step"] for r in history if "loss" in r] == [1]
    with pytest.raises(UserError, match="of the corpus, text 3"):
        go(method=method(1.0), rows=rows, steps=1)


def test_dpkd_on_gold_names_what_it_cannot_read():
    full = [r | {"response": [3, 1]} for r in ROWS]
    for bad, words in (
        ({"id": "prompt 30", "prompt": [1]}, "example prompt 30"),
        ({"id": "odd", "prompt": [1], "response": [77]}, "example odd"),
    ):
        with pytest.raises(UserError, match=words):
            go("dpkd", rows=[*full, bad], per_token=True, steps=1)


def test_a_batch_is_divided_by_processes_that_were_launched(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a cluster's scheduler, perhaps
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert minibatch_config(8, 2).batch_size == 8
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert minibatch_config(8, 2).batch_size == 4
    assert minibatch_config(8, 2, batch_size=2).gradient_accumulation_steps == 2
    with pytest.raises(UserError, match="no whole number"):
        minibatch_config(8, 2, batch_size=8)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "uld"])
def test_gkd_takes_any_divergence_also_as_a_table(divergence):
    options = {
        "jsd": {"beta": 0.3},
        "skew_kl": {"alpha": 0.2},
        "skew_reverse_kl": {"alpha": 0.2},
        "alpha_divergence": {"alpha": 0.4},
        "renyi": {"alpha": 0.4},
    }.get(divergence, {})
    result, method = go("gkd", steps=2, parts=[{"divergence": divergence, "options": options}])
    assert [p.divergence for p in method.config.parts] == [divergence]
    assert all(math.isfinite(row[divergence]) for row in result.history if "loss" in row)
    assert any(
        not torch.equal(a, b) for a, b in zip(small().parameters(), result.model.parameters())
    )


def test_parts_that_are_none_are_refused():
    for bad, words in (
        ({"divergence": "kl"}, "'kl' is not known"),
        ({"source": "nobody"}, "source"),
        ({"weigth": 2}, "no part of"),
        ("jsd", "no part of"),
    ):
        with pytest.raises(UserError, match=words):
            GKDConfig(**SMALL, parts=[bad])


def test_a_ratio_that_is_not_finite_stops_with_its_ids():
    cfg = MiniLLMConfig(pt_weight=0.0, rollouts=15)
    responses = some_responses(cfg)
    responses[4].log_mix = [-math.inf] * len(responses[4].tokens)
    responses[4].id = "p4"
    method = method_of(cfg, TEACHER)
    with pytest.raises(UserError, match="example p4.*"):
        method.loss_sums(STUDENT, method.collate(rows_of(responses)))


def test_log_probabilities_of_a_forward_pass_are_the_samplers():
    result, method = go(steps=1, inner_epochs=1)
    rows = in_use(method)
    found = token_logprobs(BIG, rows, 0)
    for r, log in zip(rows, found):
        torch.testing.assert_close(
            torch.tensor(r.log_teacher), torch.tensor(log), atol=2e-5, rtol=1e-4
        )


# ---------------------------------------------------------------- the instruction world, in tiny

WORLD = InstructionWorld()
TINY_TEACHER, TINY_STUDENT = (
    {"size": "xs", "seed": 7, "pretrain": 25, "steps": 2, "batch_size": 16},
    {"pretrain": 8, "steps": 1, "batch_size": 8},
)
TINY = dict(
    arm="minillm",
    steps=6,
    minibatch=8,
    lr=2e-3,
    max_new_tokens=12,
    teacher=TINY_TEACHER,
    student=TINY_STUDENT,
    valid_rows=4,
    score_rows=12,
    score_seeds=2,
    settings={"rollouts": 8, "inner_epochs": 2},
)


@pytest.fixture(scope="module")
def world_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.fixture
def world(world_cache, monkeypatch):
    "A cache of its own, so that every model here is trained here."
    monkeypatch.setenv("KD_NOTES_CACHE", str(world_cache))
    return world_cache


def timeless(metrics):
    return {name: value for name, value in metrics.items() if name != "train_seconds"}


def world_texts(model, tok, prompts, n=12):
    "Token ids and texts of seeds 10 and 20."
    made = [
        sample(
            model, prompts, Sampling(n, stop_ids=(tok.eos_token_id,), seed=s), vocabulary=len(tok)
        ).response_ids
        for s in (10, 20)
    ]
    return made, [
        [tok.decode(ids, skip_special_tokens=True).strip() for ids in rows] for rows in made
    ]


def test_what_is_said_of_a_students_answers_is_true(world):
    "Rouge-L by the package on the texts themselves, lengths, repetition and ends by counting, the loss by transformers."
    from rouge_score.rouge_scorer import RougeScorer

    tok, rows = load_world_tokenizer(), load_world("test")[:12]
    (student, _), (teacher, _) = (
        WorldModels().load(**TINY_TEACHER),
        WorldModels().load(**TINY_STUDENT),
    )  # the better one writes
    prompts = [tok.encode(r["prompt"], add_special_tokens=False) for r in rows]
    found = instruction_world_module.world_metrics(
        student, teacher, rows, world_texts(teacher, tok, prompts)[0][0], 2, 30
    )
    ids, texts = world_texts(student, tok, prompts, 30)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = np.array(
        [
            [
                max(scorer.score(ref, t)["rougeL"].fmeasure for ref in r["references"])
                for r, t in zip(rows, said)
            ]
            for said in texts
        ]
    )
    assert found["rouge_l"] == pytest.approx(rouge.mean()) and rouge.mean() > 0.01
    assert unpack_numbers(found["items"]) == pytest.approx(
        rouge.mean(0).tolist(), abs=0.5 / 255 + 1e-6
    )
    every = ids[0] + ids[1]
    assert (
        found["length"] == pytest.approx(sum(map(len, every)) / 24)
        and found["finished"] == sum(x[-1] == tok.eos_token_id for x in every) / 24
    )
    assert (
        0 < found["finished"] < 1
        and len({*map(len, ids[0])}) > 3
        and sum(map(len, ids[0])) != sum(map(len, ids[1]))
    )
    assert (
        found["exact"]
        == sum(t in r["references"] for said in texts for r, t in zip(rows, said)) / 24
    )
    grams = [[tuple(x[i : i + 4]) for i in range(len(x) - 3)] for x in ids[0]]
    assert found["repetition"] == pytest.approx(
        sum(1 - len({*g}) / len(g) for g in grams if g) / 12
    )
    assert (
        found["possible"]
        == sum(log_likelihood(r["prompt"], t) > -math.inf for r, t in zip(rows, texts[0])) / 12
    )
    gold = [answer_tokens(tok, r["response"]) for r in rows]
    with torch.no_grad():
        losses = [
            student(torch.tensor([p + g]), labels=torch.tensor([[-100] * len(p) + g])).loss.item()
            * len(g)
            for p, g in zip(prompts, gold)
        ]
    assert found["loss"] == pytest.approx(sum(losses) / sum(map(len, gold)), rel=1e-4)


@torch.no_grad()
def kl_along(student, teacher, prompt, answer):
    "KL(p||q) and KL(q||p) before each token of an answer."
    q, p = (
        m(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for m in (student, teacher)
    )
    return [
        torch.nn.functional.kl_div(a, b, log_target=True, reduction="none").sum(-1)
        for a, b in ((q, p), (p, q))
    ]


def test_a_students_divergences_are_those_along_its_own_and_its_teachers_answers(world):
    tok, rows = load_world_tokenizer(), load_world("test")[:12]
    (teacher, _), (student, _) = (
        WorldModels().load(**TINY_TEACHER),
        WorldModels().load(**TINY_STUDENT),
    )
    prompts = [tok.encode(r["prompt"], add_special_tokens=False) for r in rows]
    theirs, own = (world_texts(m, tok, prompts)[0][0] for m in (teacher, student))
    found = instruction_world_module.world_metrics(student, teacher, rows, theirs, 1, 12)
    along = {
        who: [kl_along(student, teacher, p, a) for p, a in zip(prompts, answers)]
        for who, answers in (("student", own), ("teacher", theirs))
    }
    for i, name in enumerate(("forward_kl", "reverse_kl")):
        assert found[name] == pytest.approx(
            torch.cat([kl[i] for kl in along["student"]]).mean().item(), rel=1e-4
        )
    for who, kls in along.items():
        means = [np.mean([kl[t].item() for kl, _ in kls if t < len(kl)]) for t in range(10)]
        assert found[f"exposure_{who}"][:2] == pytest.approx([sum(means[:5]), sum(means)], abs=2e-3)
    assert found["exposure_student"][1] != pytest.approx(found["exposure_teacher"][1], abs=0.01)


def test_one_seed_is_one_result_another_seed_another_and_cells_keep_their_places(world, tmp_path):
    cells = {"z": TINY | {"arm": "sft"}, "a": TINY, "t": TINY | {"arm": "teacher"}}
    found = WORLD.run(cells, [0])
    assert (
        list(found) == ["z", "a", "t"]
        and found["z"][0]["tokens_gold"] > 0
        and found["a"][0]["tokens_mixed"] > 0
    )
    assert (
        found["t"][0]["forward_kl"] == 0 < found["a"][0]["forward_kl"]
        and "train_seconds" not in found["t"][0]
    )
    [mine] = found["a"]
    run = WORLD.parameters(seed=0, **TINY)
    assert timeless(WORLD.train(run, tmp_path / "again")) == timeless(mine)
    stored = WORLD.results([run, WORLD.parameters(seed=0, **cells["z"])])
    assert [r["source"] for r in stored] == ["cached", "cached"] and [
        r["metrics"] for r in stored
    ] == [mine, found["z"][0]]
    other = WORLD.train(run | {"seed": 1}, tmp_path / "other")
    assert other["tokens_mixed"] != mine["tokens_mixed"] and other["loss"] != mine["loss"]


KILLED = """
    import json, os, signal, sys
    from kd_notes.experiments import instruction_world
    from kd_notes.methods import on_policy
    before = on_policy.OnPolicy.begin_step
    def begin_step(self, state):
        if state.step == 102: os.kill(os.getpid(), signal.SIGKILL)
        before(self, state)
    on_policy.OnPolicy.begin_step = begin_step
    instruction_world.InstructionWorld().results([json.loads(sys.argv[1])])
"""


def test_a_run_of_the_world_that_was_killed_goes_on_and_ends_with_the_same_numbers(
    world, tmp_path, monkeypatch
):
    "Checkpoints are 100 steps apart; 100 is in the middle of a cycle of 34."
    brief = dict(
        steps=104,
        minibatch=2,
        lr=3e-4,
        max_new_tokens=3,
        valid_rows=2,
        score_rows=4,
        score_seeds=1,
        settings={"rollouts": 4, "inner_epochs": 17},
    )
    run = WORLD.parameters(seed=0, **(TINY | brief))
    whole = WORLD.train(run, tmp_path / "whole")
    before = set(world.glob("runs/onpolicy/*"))
    script = [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps(run)]
    assert (
        subprocess.run(script, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120).returncode
        == -signal.SIGKILL
    )
    [folder] = set(world.glob("runs/onpolicy/*")) - before
    assert run_status(folder) == "killed" and last_checkpoint(folder).name == "step-0000100"
    steps, begin_step = [], OnPolicy.begin_step
    monkeypatch.setattr(
        OnPolicy,
        "begin_step",
        lambda self, state: steps.append(state.step) or begin_step(self, state),
    )
    [resumed] = WORLD.results([run])
    assert (
        steps == [100, 101, 102, 103]
        and resumed["source"] == "trained"
        and run_folder("onpolicy", resumed["key"]) == folder
    )
    assert (
        timeless(resumed["metrics"]) == timeless(whole) and read_manifest(folder)["attempts"] == 2
    )
    logs = [
        [
            {k: v for k, v in row.items() if k != "seconds"}
            for row in read_jsonl(place / "metrics.jsonl")
        ]
        for place in (folder, tmp_path / "whole")
    ]
    assert logs[0] == logs[1] and logs[0][-1]["step"] == 104


def test_what_is_recorded_needs_no_teacher_and_no_start(world, tmp_path, monkeypatch):
    old = WORLD.parameters(arm="sft", seed=0, size="s")
    new = WORLD.parameters(arm="sft", seed=1)
    row = {"metrics": {}, "key": "k", "seconds": 1, "device": "cpu", "date": "2026-11-26"}
    record_runs("onpolicy", [row | {"params": old, "source": "trained"}], tmp_path)
    asked = []
    monkeypatch.setattr(WorldModels, "results", lambda self, runs, **grid: asked.extend(runs))
    monkeypatch.setattr(InstructionWorld, "train", lambda self, run, folder: {"x": run["seed"]})
    record = {"source": "record", "record_folder": tmp_path}
    made = WORLD.results([old, new], **record)
    assert [(run["size"], run["seed"]) for run in asked] == [("m", 0), ("xs", 1)]
    assert [r["source"] for r in made] == ["replayed", "trained"]
    asked.clear()
    WORLD.results([old], **record)
    WORLD.results([new], **record)  # trained by now, so its start is not needed either
    assert asked == []
    WORLD.results([WORLD.parameters(arm="teacher", seed=0)], **record)
    assert [(run["size"], run["seed"]) for run in asked] == [("m", 0)]


def test_a_frame_is_one_teacher_and_a_start_for_each_seed(monkeypatch):
    asked = []

    def answer(self, runs, **grid):
        asked.extend(runs)
        return [
            {"params": r, "metrics": {"who": (r["arm"], r["size"], r["seed"], r["steps"])}}
            for r in runs
        ]

    monkeypatch.setattr(InstructionWorld, "results", answer)
    found = instruction_world_module.run_frame([3, 4], "s", {"steps": 7}, jobs=2)
    assert [m["who"] for m in found["start"]] == [("start", "s", 3, 7), ("start", "s", 4, 7)]
    # the same row whatever the student's size
    assert [m["who"] for m in found["teacher"]] == [("teacher", "xs", 3, 7)] and len(asked) == 3
    assert set(found) <= set(instruction_world_module.TITLES)


def test_the_key_of_a_run_follows_the_modules_that_its_arm_uses(monkeypatch):
    "A new option of DPKD or of AKL must not make the students of other arms stale."
    arms = ("sft", "minillm", "gkd", "dpkd", "start")
    runs = {arm: WORLD.parameters(arm=arm, seed=0) for arm in arms}
    akl = {"parts": [{"divergence": "adaptive_kl"}]}
    runs["akl"] = WORLD.parameters(arm="gkd", seed=0, settings=akl)
    student = {"task": "nli", "arm": "dss", "n": 10, "seed": 0}
    before = {arm: WORLD.key(run) for arm, run in runs.items()}
    before["step-by-step"] = Stepwise().key(Stepwise().parameters(**student))
    real = code_module.module_facts
    for module, stale in (
        ("losses.adaptive", {"akl"}),
        ("methods.dpkd", {"dpkd"}),
        ("methods.minillm", {"minillm"}),
        ("methods.gkd", {"gkd", "akl", "sft"}),
        ("runner.grid", set()),
        ("progress", set()),
        ("methods.step_by_step", {"step-by-step"}),
        ("core", set(before)),
    ):
        edited = {module: ("edited", real(module)[1])}
        monkeypatch.setattr(
            code_module, "module_facts", lambda name, known=edited: known.get(name) or real(name)
        )
        after = {arm: WORLD.key(run) for arm, run in runs.items()}
        after["step-by-step"] = Stepwise().key(Stepwise().parameters(**student))
        assert {arm for arm in before if after[arm] != before[arm]} == stale, module


def test_arms_and_settings_of_the_world_that_do_not_exist_are_named():
    with pytest.raises(UserError, match="no arm 'minilm'.*sft, kd"):
        WORLD.parameters(arm="minilm", seed=0)
    with pytest.raises(UserError, match="unknown settings stepz"):
        WORLD.parameters(arm="sft", seed=0, student={"stepz": 3})
    with pytest.raises(UserError, match="unknown settings step.*size, steps"):
        WORLD.run({"a": {"arm": "sft", "step": 3}}, [0])
