"""Generation: batches against one by one in float64, distributions by chi-square, beam and speculation against enumeration."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    NoRepeatNGramLogitsProcessor,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import helpers
import kd_notes.kernels as kernels
import kd_notes.generation.sampling as sampling_module
from kd_notes.generation.engine import draws
from kd_notes.core import UserError
from kd_notes.generation.beam import beam
from kd_notes.generation.sampling import (
    check_lengths,
    greedy,
    log_mixture,
    Rollout,
    sample,
    sample_mixed,
    Sampling,
)
from kd_notes.generation.speculative import speculative
from kd_notes.models.mini import mini_model
from kd_notes.training.batches import target_nll, target_positions

torch.set_num_threads(1)
VOCAB = 40
STOPS = (1, 2, 3)
WAYS = [{}, {"temperature": 0.7}, {"top_k": 4}, {"temperature": 1.4, "top_p": 0.6}]
sharper = partial(helpers.sharper, dtype=torch.float64)
SIZE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
KINDS = {
    "llama": lambda v: mini_model("causal", "xs", v, seed=0),
    "gpt2": lambda v: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=v,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=None,
            eos_token_id=1,
        )
    ),
    "opt": lambda v: OPTForCausalLM(
        OPTConfig(
            vocab_size=v,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            pad_token_id=0,
            eos_token_id=1,
        )
    ),
    "qwen2": lambda v: Qwen2ForCausalLM(Qwen2Config(vocab_size=v, **SIZE)),
    "mistral, window of 6": lambda v: MistralForCausalLM(
        MistralConfig(vocab_size=v, sliding_window=6, head_dim=8, **SIZE)
    ),
}


@pytest.fixture(scope="module")
def pair():
    return sharper(KINDS["llama"](VOCAB), 1), sharper(mini_model("causal", "s", VOCAB, seed=0), 2)


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def limited(logits, s):
    "The distribution of a draw, written the plain way."
    p = torch.softmax(logits / s.temperature, -1)
    order = p.argsort(descending=True)
    if s.top_k:
        p[order[s.top_k :]] = 0
    p, mass = p / p.sum(), 0.0
    for i in order:
        mass, p[i] = mass + float(p[i]), p[i] if mass < s.top_p else 0.0
    return p / p.sum()


def reference(models, alpha, prompt, s, name):
    "No cache, no batch, no padding: tokens, and (log q, log p, log mixture) at temperature 1."
    tokens, logs, stream = [], [], draws(s.seed, name, 0, s.max_new_tokens)
    weights = [1 - alpha, alpha][: len(models)]
    while len(tokens) < s.max_new_tokens and not (tokens and tokens[-1] in s.stop_ids):
        z = [
            m(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
            for m in models
        ]
        p = sum(w * torch.softmax(x / s.temperature, -1) for w, x in zip(weights, z))
        if s.no_repeat_ngram:
            p = NoRepeatNGramLogitsProcessor(s.no_repeat_ngram)(
                torch.tensor([prompt + tokens]), p.log()[None]
            )[0].softmax(-1)
        if s.top_k or s.top_p < 1:
            p, order = p.sort(descending=True)
            p = limited(
                p.log(), Sampling(1, top_k=s.top_k, top_p=s.top_p)
            )  # sorted already, so the order of places is the module's
        else:
            order = torch.arange(len(p))
        tokens.append(int(order[int((p.cumsum(0) <= stream[len(tokens)] * p.sum()).sum())]))
        own = [torch.log_softmax(x, -1)[tokens[-1]] for x in z]
        logs.append(
            [*map(float, own), math.log(sum(w * math.exp(x) for w, x in zip(weights, own)))]
        )
    return tokens, torch.tensor(logs).double()


# ---------------------------------------------------------------- one by one == any batch, in float64


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_one_by_one_gives(kind):
    model, prompts, names = (
        sharper(KINDS[kind](VOCAB), 3),
        prompts_of([3, 11, 1, 7, 20, 5]),
        list("abcdef"),
    )
    s = Sampling(12, stop_ids=STOPS, seed=5)
    made = sample(model, prompts, s, streams=names)
    for i, (prompt, name) in enumerate(zip(prompts, names)):
        tokens, logs = reference([model], 0, prompt, s, name)
        assert made.response_ids[i] == tokens and torch.allclose(
            made.log_student[i], logs[:, 0], atol=1e-9
        )
        assert made.finished[i] == (tokens[-1] in STOPS)
    assert len({len(r) for r in made.response_ids}) > 2  # otherwise nothing was retired
    assert torch.allclose(made.flat("log_student"), -target_nll(model, made.batch(0)), atol=1e-9)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_mixture_gives_what_one_by_one_gives(pair, way, alpha):
    prompts, names, s = (
        prompts_of([2, 9, 4, 1]),
        list("abcd"),
        Sampling(8, stop_ids=STOPS, seed=2, **way),
    )
    made = sample_mixed(*pair, prompts, alpha, s, streams=names)
    for i, (prompt, name) in enumerate(zip(prompts, names)):
        tokens, logs = reference(pair, alpha, prompt, s, name)
        assert made.response_ids[i] == tokens
        for k, kept in enumerate(("log_student", "log_teacher", "log_mix")):
            assert torch.allclose(getattr(made, kept)[i], logs[:, k], atol=1e-9)
    assert torch.allclose(made.flat("log_mix"), made.flat("log_drawn"), atol=1e-9) == (not way)


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(7)),
    some=st.integers(1, 7),
    batch_size=st.integers(1, 7),
    kind=st.sampled_from(["one", "two", "skd", "no repeats"]),
)
def test_no_sequence_depends_on_its_company(pair, order, some, batch_size, kind):
    prompts, s = prompts_of([4, 1, 9, 2, 4, 18, 3]), Sampling(9, stop_ids=STOPS, seed=1)
    prompts[4] = prompts[0][:3] + prompts[4][3:]

    def make(which, size):
        chosen, options = (
            [prompts[i] for i in which],
            {"streams": [f"s{i}" for i in which], "batch_size": size},
        )
        if kind in ("one", "no repeats"):
            return sample(
                pair[0],
                chosen,
                replace(s, no_repeat_ngram=1) if kind == "no repeats" else s,
                **options,
            )
        return (
            sample_mixed(*pair, chosen, 0.4, s, **options)
            if kind == "two"
            else speculative(*pair, chosen, s, 5, 3, **options)
        )

    whole, part = make(range(7), 64), make(order[:some], batch_size)
    for place, i in enumerate(order[:some]):
        assert (
            part.response_ids[place] == whole.response_ids[i]
            and part.prompt_ids[place] == prompts[i]
        )
        assert torch.allclose(part.log_student[place], whole.log_student[i], atol=1e-9)
        assert torch.allclose(part.log_drawn[place], whole.log_drawn[i], atol=1e-9)


def test_a_shared_beginning_is_computed_once_and_changes_nothing(pair):
    start = prompts_of([24], seed=9)[0]
    prompts, s, fed = [start + p for p in prompts_of([1, 6, 3])], Sampling(5), []
    hook = (
        pair[0]
        .get_input_embeddings()
        .register_forward_pre_hook(lambda module, args: fed.append(args[0].numel()))
    )
    made = sample(pair[0], prompts, s, streams=list("abc"))
    hook.remove()
    assert sum(fed) < 24 + 3 * 6 + 3 * 5 + 1
    assert made.response_ids == [
        reference([pair[0]], 0, p, s, n)[0] for p, n in zip(prompts, "abc")
    ]


def test_streams_are_named_by_the_prompt_or_by_the_caller(pair):
    prompts, s = prompts_of([3, 3, 5]), Sampling(8)
    made = sample(pair[0], [prompts[0], *prompts, prompts[0]], s).response_ids
    assert (
        made[0] != made[1] != made[4] and made[0] == sample(pair[0], prompts[:1], s).response_ids[0]
    )
    assert (
        sample(pair[0], prompts, Sampling(8, seed=1)).response_ids
        != sample(pair[0], prompts, s).response_ids
    )


# ---------------------------------------------------------------- the right distribution


def chi_square(counts, p):
    "p-value of Pearson's test; outcomes that are expected fewer than five times are put together."
    from scipy.stats import chisquare

    expected, n = p * counts.sum(), counts.double()
    rare = expected < 5
    if rare.any():
        expected, n = (
            torch.cat([expected[~rare], expected[rare].sum()[None]]),
            torch.cat([n[~rare], n[rare].sum()[None]]),
        )
    keep = expected > 0
    return chisquare(
        n[keep].numpy(), (expected[keep] * n[keep].sum() / expected[keep].sum()).numpy()
    ).pvalue


@pytest.mark.parametrize("way", ["student", "mixture", "top-p of the mixture", "skd"])
def test_sequences_follow_the_exact_distribution(way):
    "Two tokens from a vocabulary of 5, all 25 sequences enumerated."
    student, teacher = sharper(KINDS["llama"](5), 4), sharper(KINDS["llama"](5), 5)
    s, prompt, n = Sampling(2, top_p=0.8 if "top-p" in way else 1.0), [4, 2], 2000

    def law(tokens, way=way, s=s):
        q, p = (
            torch.softmax(m(torch.tensor([prompt + tokens])).logits[0, -1], -1)
            for m in (student, teacher)
        )
        if way == "skd":
            fine = p >= p.topk(2).values[-1]
            return q * fine + p * q[~fine].sum()
        return q if way == "student" else limited((0.4 * p + 0.6 * q).log(), s)

    exact = torch.stack([law([])[a] * law([a]) for a in range(5)]).flatten()
    assert abs(float(exact.sum()) - 1) < 1e-12
    prompts, options = [prompt] * n, {"batch_size": 1000}
    made = {
        "student": lambda: sample(student, prompts, s, **options),
        "skd": lambda: speculative(student, teacher, prompts, s, 2, 3, **options),
    }.get(way, lambda: sample_mixed(student, teacher, prompts, 0.4, s, **options))()
    counts = torch.bincount(torch.tensor([5 * a + b for a, b in made.response_ids]), minlength=25)
    assert counts[exact < 1e-12].sum() == 0 and chi_square(counts, exact) > 1e-3
    another = ("student" if way == "mixture" else "mixture", Sampling(2))
    wrong = torch.stack([law([], *another)[a] * law([a], *another) for a in range(5)]).flatten()
    assert chi_square(counts, wrong) < 1e-6  # the test would see a wrong law
    assert torch.allclose(
        torch.stack([made.log_drawn[i].sum() for i in range(n)]).exp(),
        exact[[5 * a + b for a, b in made.response_ids]],
        atol=1e-9,
    )


def test_importance_weights_are_q_over_what_was_drawn_from(pair):
    made = sample_mixed(*pair, prompts_of([3]) * 1500, 0.2, Sampling(1), batch_size=1000)
    w = made.importance()
    assert torch.allclose(w, (made.flat("log_student") - made.flat("log_mix")).exp(), atol=1e-9)
    assert (
        abs(float(w.mean()) - 1) < 4 * float(w.std()) / 1500**0.5
        and float(w.max()) <= 1 / 0.8 + 1e-9
    )
    warm = sample(pair[0], prompts_of([3]) * 50, Sampling(4, temperature=2.0))
    assert (warm.flat("log_student") - warm.flat("log_drawn")).abs().max() > 0.1
    assert torch.allclose(
        sample(pair[0], prompts_of([3]) * 9, Sampling(4)).importance(),
        torch.ones(36).double(),
        atol=1e-9,
    )


def test_log_mixture_by_hand():
    q, p = torch.tensor([0.9, 0.1, 0.0]).double(), torch.tensor([0.2, 0.0, 0.8]).double()
    for alpha in (0.0, 1e-6, 0.5, 1.0):
        assert torch.allclose(
            log_mixture(q.log(), p.log(), alpha).exp(), alpha * p + (1 - alpha) * q, atol=1e-15
        )


# ---------------------------------------------------------------- no n-gram twice

LOOPS = [[5, 6, 5, 6, 5], [7, 8, 9] * 4, [4], [10] * 9, [11, 12]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_greedy_without_repeats_agrees_with_transformers(kind, n):
    "Prompts of unequal lengths in one batch, against one at a time; the prompt's own n-grams count."
    model, s = (
        sharper(KINDS[kind](VOCAB), 6),
        Sampling(25, temperature=0.0, no_repeat_ngram=n, stop_ids=[1]),
    )
    made = [sample(model, LOOPS, s, batch_size=size).response_ids for size in (64, 2)]
    assert made[0] == made[1]
    for prompt, response in zip(LOOPS, made[0]):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=25,
            do_sample=False,
            no_repeat_ngram_size=n,
            eos_token_id=1,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert response == out
    assert made[0] != greedy(model, LOOPS, 25, [1]).response_ids  # it would repeat


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_draws_without_repeats_give_what_one_by_one_gives(pair, way, alpha):
    "The n-gram rule is applied before top-k and top-p, as transformers does; log-probabilities of the models stay their own."
    names, s = list("abcde"), Sampling(14, stop_ids=STOPS, seed=2, no_repeat_ngram=2, **way)
    made = sample_mixed(*pair, LOOPS, alpha, s, streams=names, batch_size=3)
    for i, (prompt, name) in enumerate(zip(LOOPS, names)):
        tokens, logs = reference(pair, alpha, prompt, s, name)
        grams = list(zip(prompt + tokens, (prompt + tokens)[1:]))[len(prompt) - 1 :]
        assert made.response_ids[i] == tokens and len(set(grams)) == len(grams)
        for k, kept in enumerate(("log_student", "log_teacher", "log_mix")):
            assert torch.allclose(getattr(made, kept)[i], logs[:, k], atol=1e-9)


def test_the_probability_of_a_draw_without_repeats_is_that_of_what_was_left(pair):
    made, prompt = sample(pair[0], [LOOPS[0]] * 50, Sampling(1, no_repeat_ngram=1)), LOOPS[0]
    q = torch.softmax(pair[0](torch.tensor([prompt])).logits[0, -1], -1)
    assert torch.allclose(
        made.flat("log_student") - made.flat("log_drawn"),
        (1 - q[5] - q[6]).log().expand(50),
        atol=1e-9,
    )
    assert not {5, 6} & {t for r in made.response_ids for t in r}


def test_a_rule_that_forbids_nothing_changes_no_bit(pair):
    prompts, s = prompts_of([4, 9, 2]), dict(max_new_tokens=12, stop_ids=STOPS, top_p=0.9)
    plain, ruled = (sample(pair[0], prompts, Sampling(no_repeat_ngram=n, **s)) for n in (0, 50))
    assert plain.response_ids == ruled.response_ids
    assert all(
        torch.equal(plain.flat(name), ruled.flat(name)) for name in ("log_student", "log_drawn")
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rule_that_forbids_everything_forbids_nothing(temperature):
    made = sample(
        sharper(KINDS["llama"](5), 4), [[4, 2], [3]], Sampling(9, temperature, no_repeat_ngram=1)
    )
    assert [sorted(r[:k]) for r, k in zip(made.response_ids, (3, 4))] == [[0, 1, 3], [0, 1, 2, 4]]
    assert [len(r) for r in made.response_ids] == [9, 9] and made.flat("log_drawn").isfinite().all()


# ---------------------------------------------------------------- what a training gets


def test_a_rollout_is_a_training_batch_without_prompt_tokens(pair):
    made = sample(pair[0], prompts_of([3, 8, 1]), Sampling(6, stop_ids=STOPS))
    batch, other = made.batch(pad_id=0), made.batch(pad_id=7)
    wanted = [t for r in made.response_ids for t in r]
    index, ids = target_positions(batch)
    assert ids.tolist() == wanted and len(index) == len(wanted)
    rows, columns = (
        index // batch["input_ids"].shape[1],
        index % batch["input_ids"].shape[1],
    )
    assert all(int(c) >= len(made.prompt_ids[r]) - 1 for r, c in zip(rows, columns))
    assert torch.equal(
        target_nll(pair[0], batch), target_nll(pair[0], other)
    )  # padding has no influence
    with pytest.raises(UserError, match="holds no log_teacher"):
        made.flat("log_teacher")


def test_log_probabilities_are_constants_that_gradients_may_meet(pair):
    student = mini_model("causal", "xs", VOCAB, seed=3)
    made = sample(student, prompts_of([3, 5]), Sampling(4))
    assert student.training and not made.flat("log_student").requires_grad
    ratio = (-target_nll(student, made.batch(0)) - made.flat("log_student")).exp()
    (ratio * made.importance()).sum().backward()
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-4)
    assert all(p.grad is not None for p in student.parameters())


def test_dropout_is_off_meanwhile_and_the_mode_comes_back_after_an_error():
    student = mini_model("causal", "xs", VOCAB, seed=3, dropout=0.5)
    prompts = prompts_of([6, 3])
    assert (
        sample(student, prompts, Sampling(6)).response_ids
        == sample(student.eval(), prompts, Sampling(6)).response_ids
    )
    student.train()
    with pytest.raises(UserError):
        sample(student, [[]], Sampling(6))
    assert student.training


def test_an_adapter_is_sampled_with_its_weights():
    from peft import LoraConfig, get_peft_model

    base, prompts = sharper(KINDS["llama"](VOCAB), 3), prompts_of([4, 2])
    before = sample(base, prompts, Sampling(8)).response_ids
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    ).double()
    made = sample(model, prompts, Sampling(8))
    assert made.response_ids != before
    assert torch.allclose(made.flat("log_student"), -target_nll(model, made.batch(0)), atol=1e-9)


def test_autocast_around_it_changes_nothing():
    model, prompts = mini_model("causal", "xs", VOCAB, seed=3), prompts_of([4, 2])
    plain = sample(model, prompts, Sampling(6))
    with torch.autocast("cpu", torch.bfloat16):
        inside = sample(model, prompts, Sampling(6))
    assert torch.equal(plain.flat("log_student"), inside.flat("log_student"))


# ---------------------------------------------------------------- packed weights


def test_packed_or_not_the_same_tokens(monkeypatch):
    model, prompts, s = mini_model("causal", "s", 300, seed=0), prompts_of([4, 9, 2]), Sampling(20)
    plain = sample(model, prompts, s)
    monkeypatch.setattr(kernels, "PACK_FROM", 1000)
    seen, inner = [], sampling_module.packed
    monkeypatch.setattr(
        sampling_module,
        "packed",
        lambda *models, rows: seen.append(len(models)) or inner(*models, rows=rows),
    )
    fast = sample(model, prompts, s)
    assert seen == [1] and fast.response_ids == plain.response_ids
    assert torch.allclose(fast.flat("log_student"), plain.flat("log_student"), atol=1e-4)


# ---------------------------------------------------------------- greedy and beam


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_and_beam_agree_with_transformers(kind):
    model = sharper(KINDS[kind](VOCAB), 6, scale=1.5)
    prompts = prompts_of([5, 2, 9, 5])
    made = {
        1: greedy(model, prompts, 9, [1]),
        3: beam(model, prompts, 3, 9, [1], role="student"),
        4: beam(model, prompts, 4, 9, [1], length_penalty=0.3, role="student"),
    }
    for width, rollout in made.items():
        for prompt, response, logs in zip(prompts, rollout.response_ids, rollout.log_student):
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=9,
                num_beams=width,
                do_sample=False,
                eos_token_id=1,
                pad_token_id=0,
                length_penalty=0.3 if width == 4 else 1.0,
            )[0, len(prompt) :].tolist()
            assert response == out[: len(response)] and not any(out[len(response) :])
            assert torch.allclose(
                logs,
                -target_nll(model, Rollout([prompt], [response], [True], []).batch(0)),
                atol=1e-9,
            )


def enumerated(model, prompt, steps, stop, size):
    every = [
        y
        for n in range(1, steps + 1)
        for y in itertools.product(range(size), repeat=n)
        if stop not in y[:-1] and (y[-1] == stop or n == steps)
    ]
    scores = [
        float(-target_nll(model, Rollout([prompt], [list(y)], [True], []).batch(0)).sum())
        for y in every
    ]
    return every, scores


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_sequences(penalty):
    model, prompts = sharper(KINDS["llama"](4), 7, scale=1.0), [[3, 2, 1], [2]]
    made = beam(model, prompts, 100, 4, [0], length_penalty=penalty, keep=3)
    for i, prompt in enumerate(prompts):
        every, scores = enumerated(model, prompt, 4, 0, 4)
        assert abs(sum(map(math.exp, scores)) - 1) < 1e-9
        best = sorted(zip(scores, every), key=lambda x: -x[0] / len(x[1]) ** penalty)[:3]
        assert [tuple(r) for r in made.response_ids[3 * i : 3 * i + 3]] == [y for _, y in best]
        assert [round(float(x.sum()), 9) for x in made.log_teacher[3 * i : 3 * i + 3]] == [
            round(x, 9) for x, _ in best
        ]


def test_prompts_of_a_beam_do_not_depend_on_each_other(pair):
    prompts = prompts_of([5, 2, 9, 1, 4])
    together = beam(pair[1], prompts, 3, 8, STOPS).response_ids
    assert [beam(pair[1], [p], 3, 8, STOPS).response_ids[0] for p in prompts] == together
    assert beam(pair[1], prompts, 3, 8, STOPS, batch_size=6).response_ids == together
    assert (
        beam(pair[1], prompts, 1, 8, STOPS).response_ids
        == greedy(pair[1], prompts, 8, STOPS).response_ids
    )


# ---------------------------------------------------------------- speculative


@pytest.mark.parametrize("way", [{}, {"temperature": 0.7}, {"temperature": 0.0}], ids=str)
def test_speculation_at_both_ends(pair, way):
    prompts, names, s = prompts_of([3, 8, 1, 5]), list("abcd"), Sampling(10, stop_ids=STOPS, **way)
    mine, yours = (
        speculative(*pair, prompts, s, top_k=k, block=4, streams=names) for k in (VOCAB, 0)
    )
    assert mine.response_ids == sample(pair[0], prompts, s, streams=names).response_ids
    assert (
        yours.response_ids
        == sample(pair[1], prompts, s, streams=[f"{n} again" for n in names]).response_ids
    )
    assert all(map(all, mine.accepted)) and not any(map(any, yours.accepted))


@pytest.mark.parametrize("kind", KINDS)
def test_speculation_gives_what_token_by_token_gives(kind, pair):
    student, teacher, s, k = (
        pair[0],
        sharper(KINDS[kind](VOCAB), 8),
        Sampling(11, stop_ids=STOPS),
        6,
    )
    prompts, names = prompts_of([3, 8, 1, 5]), list("abcd")
    made = [
        speculative(student, teacher, prompts, s, k, block, streams=names) for block in (1, 4, 20)
    ]
    for i, (prompt, name) in enumerate(zip(prompts, names)):
        first, second, tokens, own = draws(0, name, 0, 11), draws(0, f"{name} again", 0, 11), [], []
        while len(tokens) < 11 and not (tokens and tokens[-1] in STOPS):
            q, p = (
                torch.softmax(m(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1], -1)
                for m in (student, teacher)
            )
            y = int((q.cumsum(0) <= first[len(tokens)] * q.sum()).sum())
            own.append(y in p.topk(k).indices)
            tokens.append(
                y if own[-1] else int((p.cumsum(0) <= second[len(tokens)] * p.sum()).sum())
            )
        for m in made:
            assert m.response_ids[i] == tokens and m.accepted[i] == own
    for name, model in [("log_student", student), ("log_teacher", teacher)]:
        assert torch.allclose(made[1].flat(name), -target_nll(model, made[1].batch(0)), atol=1e-9)
    assert 0 < sum(map(sum, made[0].accepted)) < sum(map(len, made[0].accepted))


def test_one_pass_of_the_teacher_checks_a_block(pair):
    calls = []
    hook = (
        pair[1]
        .get_input_embeddings()
        .register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    )
    speculative(*pair, prompts_of([4, 4]), Sampling(21), top_k=VOCAB, block=5)
    hook.remove()
    assert calls == [4, 5, 5, 5, 5]


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_sampled_is_refused_with_its_place(pair):
    student, teacher = pair
    small, t5 = sharper(KINDS["llama"](VOCAB - 4)), mini_model("t5", "xs", VOCAB, seed=0)
    cases = [
        (lambda: sample(student, [[5], []], Sampling(4)), "prompt 1: the prompt is empty"),
        (
            lambda: sample(student, [[5], [6] * 500], Sampling(40)),
            "prompt 1: 500 tokens and 40 new ones do not fit the context of 512",
        ),
        (
            lambda: sample_mixed(student, small, [[5]], 0.5, Sampling(4)),
            "the student knows 40 tokens, the teacher 36",
        ),
        (
            lambda: speculative(student, small, [[5]], Sampling(4)),
            "the student knows 40 tokens, the teacher 36",
        ),
        (lambda: sample(student, [[5]], Sampling(4), vocabulary=41), "41 is not between 1 and 40"),
        (
            lambda: sample_mixed(student, teacher, [[5]], -0.1, Sampling(4)),
            "alpha: -0.1 is not a share",
        ),
        (
            lambda: sample_mixed(student, teacher, [[5]], float("nan"), Sampling(4)),
            "alpha: nan is not a share",
        ),
        (lambda: sample(t5, [[5]], Sampling(4)), "an encoder and a decoder"),
        (
            lambda: sample(student, [[5], [6]], Sampling(4), streams=["a"]),
            "1 different names for 2 prompts",
        ),
        (lambda: beam(student, [[5]], 0), "parameter width"),
        (lambda: beam(student, [[5]], 2, keep=3), "parameter keep"),
        (lambda: speculative(student, teacher, [[5]], Sampling(4), block=0), "parameter block"),
        (lambda: Sampling(0), "max_new_tokens"),
        (lambda: Sampling(4, temperature=-1.0), "temperature"),
        (lambda: Sampling(4, no_repeat_ngram=-1), "no_repeat_ngram"),
        (
            lambda: speculative(student, teacher, [[5]], Sampling(4, no_repeat_ngram=2)),
            "no_repeat_ngram",
        ),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
    assert len(sample(student, [], Sampling(4))) == 0 and len(beam(student, [])) == 0


def test_texts_that_do_not_fit_every_context_are_named():
    long, short = KINDS["llama"](VOCAB), KINDS["gpt2"](VOCAB)  # 512 and 128
    check_lengths([long, short], {"a": 128, "b": 1})
    check_lengths([long, short], {"a": 120}, new=8)
    check_lengths([mini_model("t5", "xs", VOCAB, seed=0)], {"a": 10**6})  # relative positions
    with pytest.raises(UserError, match="^b: 129 tokens do not fit the context of 128"):
        check_lengths([long, short], {"a": 128, "b": 129})
    with pytest.raises(
        UserError, match="^a: 121 tokens and 8 new ones do not fit the context of 128"
    ):
        check_lengths([long, short], {"a": 121}, new=8)


def untied(*broken):
    "A model whose embeddings of these tokens are NaN: only texts that hold one of them are lost."
    model = sharper(KINDS["qwen2"](VOCAB), 6)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    model.get_input_embeddings().weight.data[list(broken)] = math.nan
    return model


NAN_PROMPTS, EIGHT = (
    [[5, 6], [37, 7], [8], [9, 37]],
    Sampling(8),
)  # none of these ways draws 37 by itself
NAN_WAYS = {
    "sample": lambda bad, good: sample(bad, NAN_PROMPTS, EIGHT),
    "top-p": lambda bad, good: sample(bad, NAN_PROMPTS, Sampling(8, top_p=0.5)),
    "top-k": lambda bad, good: sample(bad, NAN_PROMPTS, Sampling(8, top_k=3)),
    "greedy": lambda bad, good: greedy(bad, NAN_PROMPTS, 8),
    "no repeats": lambda bad, good: sample(bad, NAN_PROMPTS, Sampling(8, no_repeat_ngram=1)),
    "student of a mixture": lambda bad, good: sample_mixed(bad, good, NAN_PROMPTS, 0.4, EIGHT),
    "teacher of a mixture": lambda bad, good: sample_mixed(good, bad, NAN_PROMPTS, 0.4, EIGHT),
    "teacher who has no share": lambda bad, good: sample_mixed(good, bad, NAN_PROMPTS, 0.0, EIGHT),
    "greedy mixture": lambda bad, good: sample_mixed(good, bad, NAN_PROMPTS, 0.4, Sampling(8, 0.0)),
    "student of a speculation": lambda bad, good: speculative(bad, good, NAN_PROMPTS, EIGHT, 5, 3),
    "teacher of a speculation": lambda bad, good: speculative(good, bad, NAN_PROMPTS, EIGHT, 5, 3),
    "greedy speculation": lambda bad, good: speculative(
        good, bad, NAN_PROMPTS, Sampling(8, 0.0), 5, 3
    ),
}


@pytest.mark.parametrize("way", NAN_WAYS)
def test_no_text_is_drawn_from_what_is_no_number(way):
    with pytest.raises(UserError) as caught:
        NAN_WAYS[way](untied(37), untied())
    said = (
        "teacher"
        if "teacher" in way or way in ("greedy mixture", "greedy speculation")
        else "student"
    )
    assert str(caught.value).startswith(f"prompt 1, prompt 3: log_{said} of new token 1 is NaN")


@pytest.mark.parametrize("width", [1, 3])
def test_no_beam_goes_through_what_is_no_number(width):
    with pytest.raises(UserError, match="^prompt 1: .*new token 1 is NaN"):
        beam(untied(37), NAN_PROMPTS[:3], width, 8)
    second = greedy(untied(), [[5, 6]], 2).response_ids[0][0]
    with pytest.raises(UserError, match="^prompt 0: .*new token 2 is NaN"):
        beam(untied(second), [[5, 6]], width, 8)


def test_what_is_no_number_is_named_with_its_step_and_the_callers_name():
    first, second, *_ = greedy(untied(), [[5, 6]], 3).response_ids[0]
    assert len({5, 6, first, second}) == 4
    with pytest.raises(UserError, match=r"^prompt 0 \(mine\): log_student of new token 3 is NaN"):
        greedy(untied(second), [[5, 6]], 5, streams=["mine"])
    assert greedy(untied(second), [[5, 6]], 2).response_ids == [
        [first, second]
    ]  # ends before anything is lost


def test_a_token_that_is_ruled_out_is_no_fault(pair):
    "-inf is a log-probability."
    teacher = sharper(KINDS["opt"](VOCAB), 3)
    inner = teacher.forward
    teacher.forward = lambda *args, **kwargs: (
        (out := inner(*args, **kwargs)).logits.__setitem__((..., slice(4, 20)), -math.inf) or out
    )
    made = sample_mixed(pair[0], teacher, prompts_of([3, 5]), 0.1, Sampling(20))
    assert (made.flat("log_teacher") == -math.inf).any() and made.flat("log_mix").isfinite().all()


def test_a_padded_vocabulary_is_cut_on_purpose(pair):
    "A teacher with four more outputs, which are likely: they are never drawn, and its probabilities are those without them."
    student, teacher = pair
    wide = sharper(mini_model("causal", "s", VOCAB + 4, seed=0), 2)
    for a, b in zip(wide.parameters(), teacher.parameters()):
        a.data[: b.shape[0]] = b.data
        a.data[b.shape[0] :] = (
            3 * b.data[: a.shape[0] - b.shape[0]] if a.shape != b.shape else a.data[b.shape[0] :]
        )
    prompts = prompts_of([3, 6])
    for make in (
        lambda t, v: sample_mixed(student, t, prompts, 0.7, Sampling(8), vocabulary=v),
        lambda t, v: speculative(student, t, prompts, Sampling(8), top_k=5, vocabulary=v),
    ):
        cut, plain = make(wide, VOCAB), make(teacher, None)
        assert cut.response_ids == plain.response_ids
        assert torch.allclose(cut.flat("log_teacher"), plain.flat("log_teacher"), atol=1e-9)
    assert (
        max(t for r in greedy(wide, prompts, 8, vocabulary=VOCAB).response_ids for t in r) < VOCAB
    )
