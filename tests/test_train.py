"""The training loop: numbers, invariances, kills and resumes, bad data. Real models, real processes, real kills."""

import copy
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kd_notes.training.batches as batches_module
import kd_notes.training.loop as loop_module
import kd_notes.training.memory as memory_module
import kd_notes.training.setup as training_setup
import kd_notes.training.state as state_module
from kd_notes.core import read_jsonl, UserError
from kd_notes.models.layer_drop import layer_drop
from kd_notes.models.mini import mini_model
from kd_notes.training.batches import (
    Batch,
    batch_order,
    causal_batch,
    micro_batches,
    seq2seq_batch,
    target_logits,
    target_nll,
    target_positions,
    target_states,
)
from kd_notes.losses.decoupled import EasyHard
from kd_notes.losses.divergences import _options, DIVERGENCES
from kd_notes.methods.gkd import GKD, GKDConfig, Part
from kd_notes.methods.logit_kd import KD
from kd_notes.models.pretrained import _merge_adapter, merge_adapters
from kd_notes.training.checkpoint import last_checkpoint, rng_state, save_model, set_rng_state
from kd_notes.training.loop import train
from kd_notes.training.setup import add_lora
from kd_notes.training.method import Method, SFT
from kd_notes.training.state import Callback, lr_factor, TrainConfig, WeightAverage

torch.set_num_threads(1)
VOCAB = 64


class Rows(SFT):
    "SFT on rows of ids: no tokenizer needed."

    def __init__(self, family="causal"):
        self.family, self.tokenizer = (
            family,
            type("Ids", (), {"pad_token_id": 0, "eos_token_id": 1}),
        )

    def encode(self, example):
        return {"prompt": example["prompt"], "completion": example["completion"]}


def rows(n, seed=0, longest=12):
    "Reverse a short list of numbers: lengths differ, and there is something to learn."
    draw, out = random.Random(seed), []
    for i in range(n):
        source = [draw.randrange(4, VOCAB) for _ in range(draw.randint(2, longest))]
        out.append(
            {
                "id": f"row-{i}",
                "prompt": [2, *source, 3],
                "completion": [*source[::-1][: draw.randint(1, 4)], 1],
            }
        )
    return out


EXAMPLES = rows(96)


def config(**changes):
    return TrainConfig(
        **(
            {"max_steps": 12, "batch_size": 8, "lr": 2e-3, "log_every": 1, "device": "cpu"}
            | changes
        )
    )


def run(
    family="causal",
    seed=0,
    examples=EXAMPLES,
    method=None,
    dropout=0.0,
    run_dir=None,
    validate=None,
    callbacks=(),
    **changes,
):
    model = mini_model(family, "xs", VOCAB, seed, dropout)
    return train(
        model,
        method or Rows(family),
        examples,
        config(**changes),
        run_dir=run_dir,
        validate=validate,
        callbacks=callbacks,
    )


def losses(result):
    return [row["loss"] for row in result.history if "loss" in row]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def mean_loss(model):
    batch = Rows().collate([Rows().encode(e) for e in rows(32, seed=9)])
    return {"score": -target_nll(model, batch).mean().item()}


# ---------------------------------------------------------------- numbers

GOLDEN = {
    "causal": [4.56300, 4.00247, 4.49845, 4.36674],
    "t5": [4.83850, 4.54247, 4.15265, 3.87756],
}


@pytest.mark.parametrize("family", GOLDEN)
def test_golden_losses_of_the_first_steps(family):
    assert losses(run(family, max_steps=4)) == pytest.approx(GOLDEN[family], abs=2e-4)


@pytest.mark.parametrize("family", GOLDEN)
def test_first_loss_is_the_models_own(family):
    "The first logged loss, derived a second way: Hugging Face's loss on the same rows, one by one, weighted by their targets."
    first = next(batch_order([Rows().num_tokens(Rows().encode(e)) for e in EXAMPLES], 8, 0))
    model, total, count = mini_model(family, "xs", VOCAB, 0), 0.0, 0
    for i in first:
        source, target = EXAMPLES[i]["prompt"], EXAMPLES[i]["completion"]
        ids, labels = (
            (source, target) if family == "t5" else (source + target, [-100] * len(source) + target)
        )
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        total, count = total + loss * len(target), count + len(target)
    assert losses(run(family, max_steps=1))[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("family", GOLDEN)
@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (1, 8)])
def test_accumulation_changes_nothing(family, shape):
    whole, parts = (
        run(family),
        run(family, batch_size=shape[0], gradient_accumulation_steps=shape[1]),
    )
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-4)
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_accumulation_is_exact_in_float64():
    def train64(micro, accumulate):
        model = mini_model("causal", "xs", VOCAB, 0).double()
        return train(
            model,
            Rows(),
            EXAMPLES,
            config(batch_size=micro, gradient_accumulation_steps=accumulate, max_steps=6),
        ).model

    for a, b in zip(train64(8, 1).parameters(), train64(2, 4).parameters()):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_training_learns_and_is_the_same_every_time():
    torch.manual_seed(123)
    a = run(max_steps=150, lr=5e-3, dropout=0.1)
    random.random(), torch.rand(7)
    b = run(max_steps=150, lr=5e-3, dropout=0.1)
    assert losses(a)[-1] < 0.8 * losses(a)[0]
    assert losses(a) == losses(b) and same_bits(a.model, b.model)


def test_another_seed_is_another_training():
    assert losses(run()) != losses(run(**{"seed": 0}, examples=EXAMPLES[::-1]))
    a = train(mini_model("causal", "xs", VOCAB, 0), Rows(), EXAMPLES, config(seed=1))
    assert losses(a) != losses(run())


class FusedRows(Rows):
    fused = True

    def __init__(self):
        super().__init__()
        self.fused = True


class TwoTerms(Rows):
    "First target token and the rest as two terms."

    def __init__(self, weights):
        super().__init__()
        self.loss_weights = weights

    def token_counts(self, batch):
        return {
            "first": len(batch["input_ids"]),
            "rest": len(target_positions(batch).ids) - len(batch["input_ids"]),
        }

    def loss_sums(self, model, batch):
        nll = target_nll(model, batch)
        starts = torch.ones(len(nll), dtype=torch.bool)
        index, _ = target_positions(batch)
        starts[1:] = index[1:] != index[:-1] + 1
        return {"first": nll[starts].sum(), "rest": nll[~starts].sum()}


@given(st.floats(0.1, 5), st.floats(0.1, 5))
@settings(max_examples=5, deadline=None)
def test_the_total_is_the_weighted_sum_of_token_means(w1, w2):
    result = run(
        method=TwoTerms({"first": w1, "rest": w2}),
        max_steps=2,
        batch_size=2,
        gradient_accumulation_steps=4,
    )
    for row in result.history:
        assert row["loss"] == pytest.approx(w1 * row["first"] + w2 * row["rest"], rel=1e-6)


def test_a_term_of_weight_zero_is_measured_and_has_no_effect():
    def final(weights):
        return run(method=TwoTerms(weights), max_steps=5)

    with_zero, other = final({"first": 1.0, "rest": 0.0}), final({"first": 1.0, "rest": 1.0})
    assert all(row["rest"] > 0 and row["loss"] == row["first"] for row in with_zero.history)
    assert not same_bits(with_zero.model, other.model)

    class OnlyFirst(TwoTerms):
        def token_counts(self, batch):
            return {"first": super().token_counts(batch)["first"]}

        def loss_sums(self, model, batch):
            return {"first": super().loss_sums(model, batch)["first"]}

    alone = run(method=OnlyFirst({"first": 1.0}), max_steps=5)
    for a, b in zip(alone.model.parameters(), with_zero.model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_step_is_adamw_with_clipping_and_decay():
    "One step of the loop against torch's own AdamW (not fused), clip and schedule, written out."
    cfg = config(max_steps=2, weight_decay=0.1, max_grad_norm=0.05, warmup=1, lr=1e-2)
    result = train(mini_model("causal", "xs", VOCAB, 0), Rows(), EXAMPLES, cfg)
    model, method = mini_model("causal", "xs", VOCAB, 0), Rows()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=False, foreach=False)
    order = batch_order([method.num_tokens(method.encode(e)) for e in EXAMPLES], 8, 0)
    for step, chosen in enumerate(islice(order, 2)):
        batch = method.collate([method.encode(EXAMPLES[i]) for i in chosen])
        target_nll(model, batch).mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert (
            result.history[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
            and norm > 0.05
        )
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * [0.5, 1.0][step]
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(result.model.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 300), st.floats(0, 0.5), st.sampled_from(state_module.SCHEDULES))
def test_schedules_rise_then_fall(steps, warmup, name):
    cfg = TrainConfig(max_steps=steps, batch_size=1, lr=1.0, warmup=warmup, schedule=name)
    factors = [lr_factor(s, cfg) for s in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert name == "constant" or factors[top:] == sorted(factors[top:], reverse=True)
    assert top <= math.ceil(warmup * steps)


# ---------------------------------------------------------------- batches


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=120),
    st.integers(1, 17),
    st.integers(0, 5),
    st.booleans(),
)
def test_no_example_is_lost_or_favoured(sizes, batch, seed, bucket):
    epochs, n = 3, len(sizes)
    first = list(islice(batch_order(sizes, batch, seed, bucket, window=3), epochs * n // batch))
    again = list(islice(batch_order(sizes, batch, seed, bucket, window=3), epochs * n // batch))
    assert first == again and all(len(b) == batch for b in first)
    seen = [i for b in first for i in b]
    assert epochs * n - len(seen) < batch  # all but a leftover of less than one batch
    missing = epochs * n - sum(min(seen.count(i), epochs) for i in range(n))
    assert missing == epochs * n - len(seen) and max(seen.count(i) for i in range(n)) <= epochs
    assert all([sizes[i] for i in b] == sorted(sizes[i] for i in b) for b in first)


def test_buckets_save_padding_and_epochs_differ():
    draw = random.Random(0)
    sizes = [draw.randint(5, 100) for _ in range(640)]

    def padded(bucket):
        return sum(
            len(b) * max(sizes[i] for i in b) for b in islice(batch_order(sizes, 16, 0, bucket), 40)
        )

    assert padded(True) < 0.75 * padded(False)
    stream = list(islice(batch_order(sizes, 16, 0), 80))
    assert stream[:40] != stream[40:] and not {frozenset(b) for b in stream[:40]} & {
        frozenset(b) for b in stream[40:]
    }


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_micro_batches_are_a_partition(width, accumulate, world):
    batch = list(range(width * accumulate * world))
    shares = [micro_batches(batch, accumulate, world, rank) for rank in range(world)]
    assert all(len(s) == accumulate and all(len(m) == width for m in s) for s in shares)
    assert sorted(i for s in shares for m in s for i in m) == batch


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(4, 60), min_size=1, max_size=9),
            st.lists(st.integers(4, 60), min_size=1, max_size=5),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_targets_sit_where_they_are_predicted(pairs):
    batch = causal_batch(pairs, 0)
    flat = batch["input_ids"].flatten()
    tokens = [t for _, target in pairs for t in target]
    index, ids = target_positions(batch)
    assert flat[index + 1].tolist() == ids.tolist() == tokens
    assert batch["attention_mask"].sum(1).tolist() == [len(p) + len(t) for p, t in pairs]
    both = seq2seq_batch(pairs, 0)
    assert both["attention_mask"].sum(1).tolist() == [len(s) for s, _ in pairs]
    index, ids = target_positions(both)
    width = both["labels"].shape[1]
    assert ids.tolist() == tokens
    assert index.tolist() == [
        row * width + i for row, (_, target) in enumerate(pairs) for i in range(len(target))
    ]


@pytest.mark.parametrize("family", GOLDEN)
def test_a_model_takes_a_batch_as_it_is_and_its_loss_is_ours(family):
    model, method = mini_model(family, "xs", VOCAB, 0).eval(), Rows(family)
    batch = method.collate([method.encode(e) for e in EXAMPLES[:8]])
    assert set(batch.keys()) == {"input_ids", "attention_mask", "labels"}
    own = model(**batch).loss
    torch.testing.assert_close(target_nll(model, batch).mean(), own)
    plain = {name: batch[name] for name in batch}  # a dict, as another collator makes it
    torch.testing.assert_close(target_nll(model, plain), target_nll(model, batch))


def test_targets_are_found_again_from_labels_and_on_the_left_of_padding():
    batch = Rows().collate([Rows().encode(e) for e in EXAMPLES[:5]])
    kept, derived = target_positions(batch), target_positions({"labels": batch["labels"]})
    assert all(torch.equal(a, b) for a, b in zip(kept, derived))
    model = mini_model("causal", "xs", VOCAB, 0).eval()
    width = batch["input_ids"].shape[1]
    moved = {}
    for name in batch:  # padding to the left, as generation wants it and some collators do it
        used = batch["attention_mask"].sum(1)
        rows = [torch.cat([row[n:], row[:n]]) for row, n in zip(batch[name], used, strict=True)]
        moved[name] = torch.stack(rows)
    assert moved["attention_mask"][:, -1].all() and not moved["attention_mask"][:, 0].all()
    position = (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)
    left = target_nll(model, moved | {"position_ids": position})
    torch.testing.assert_close(left, target_nll(model, batch), atol=1e-5, rtol=1e-4)
    assert width == moved["labels"].shape[1]


def test_columns_stay_apart_and_move_with_the_batch():
    batch = Rows().collate([Rows().encode(e) for e in EXAMPLES[:2]])
    batch.columns["weight"] = torch.ones(3)
    batch.columns["teacher"] = Rows().collate([Rows().encode(e) for e in EXAMPLES[2:4]])
    moved = batch.to("meta")
    assert "weight" not in moved and "weight" not in dict(moved)
    assert moved.columns["weight"].device.type == "meta"
    assert moved.columns["teacher"]["labels"].device.type == "meta"
    assert target_positions(moved).index.device.type == "meta"


@pytest.mark.parametrize("family", GOLDEN)
def test_padding_and_neighbours_change_nothing(family):
    model, method = mini_model(family, "s", VOCAB, 0).eval(), Rows(family)
    together = target_nll(model, method.collate(EXAMPLES[:8]))
    alone = torch.cat([target_nll(model, method.collate([e])) for e in EXAMPLES[:8]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    batch = method.collate(EXAMPLES[:8])
    poisoned = batch.map(torch.clone)
    poisoned["input_ids"][batch["attention_mask"] == 0] = 33
    torch.testing.assert_close(target_nll(model, poisoned), together, atol=1e-5, rtol=1e-5)


def other_architectures():
    import transformers as tf

    small = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    yield (
        "gpt2",
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2)),
    )
    yield "qwen2", lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**small, num_key_value_heads=1))
    yield "neox", lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**small))
    yield "phi", lambda: tf.PhiForCausalLM(tf.PhiConfig(**small))
    yield (
        "opt",
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=48,
                word_embed_proj_dim=16,
            )
        ),
    )
    yield (
        "gemma2 (soft cap)",
        lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(
                **small, num_key_value_heads=1, head_dim=16, final_logit_softcapping=3.0
            )
        ),
    )
    yield (
        "cohere (logit scale)",
        lambda: tf.CohereForCausalLM(tf.CohereConfig(**small, logit_scale=0.0625)),
    )
    yield (
        "granite (logits scaling)",
        lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**small, logits_scaling=8.0)),
    )
    yield (
        "t5 untied",
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=VOCAB,
                d_model=32,
                d_kv=16,
                d_ff=48,
                num_layers=2,
                num_heads=2,
                tie_word_embeddings=False,
                decoder_start_token_id=0,
            )
        ),
    )


@pytest.mark.parametrize(
    "name, build", list(other_architectures()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_target_logits_equal_the_full_models(name, build):
    torch.manual_seed(0)
    model, method = (
        build().double().eval(),
        Rows("t5" if name.startswith("t5") else "causal"),
    )  # in float32 the order of sums shows
    batch = method.collate(EXAMPLES[:4])
    own = model(**batch)
    full = own.logits.flatten(0, 1)[target_positions(batch).index]
    torch.testing.assert_close(target_logits(model, batch), full, atol=1e-10, rtol=1e-10)
    nll = target_nll(model, batch).mean().float()  # a model computes its loss in float32
    torch.testing.assert_close(nll, own.loss.float(), atol=1e-5, rtol=1e-5)


BEGINNING = [5, 9, 3, 7] * 5  # 20 tokens that all prompts share


def alike(rows: int = 4):
    "Return a batch of rows of several lengths that begin alike."
    ends = [([10 + i], [20 + j for j in range(1 + 2 * i)]) for i in range(rows)]
    return causal_batch([(BEGINNING + prompt, completion) for prompt, completion in ends], 0)


def gradients_of(model, batch):
    model.zero_grad()
    states = target_states(model, batch)
    (states * states.detach().cos()).sum().backward()
    return [states.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "name, build", list(other_architectures()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_shared_beginning_read_once_gives_the_same_states_and_gradients(name, build, monkeypatch):
    if name.startswith("t5"):
        pytest.skip("an encoder-decoder reads whole rows")
    torch.manual_seed(0)
    model = build().double().eval()
    batch = alike()
    plain = gradients_of(model, batch)
    read = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    monkeypatch.setattr(batches_module, "SHARED_MODELS", 0)
    fast = gradients_of(model, batch)
    if getattr(model.config, "sliding_window", None) is None:
        assert read[-2:] == [(1, 20), (4, 7)]  # 28 columns; the last one predicts nothing
    for a, b in zip(fast, plain, strict=True):  # norms and positions round to float32
        torch.testing.assert_close(a, b, atol=1e-12 + 1e-6 * float(b.abs().max()), rtol=0)


def test_the_beginning_is_shared_only_where_that_is_right(monkeypatch):
    torch.manual_seed(0)
    model = dict(other_architectures())["qwen2"]().eval()
    batch = alike()
    inputs = {"input_ids": batch["input_ids"]}
    index = target_positions(batch).index
    assert batches_module.shared_beginning(model, inputs, index) == 0  # a small model
    monkeypatch.setattr(batches_module, "SHARED_MODELS", 0)
    assert batches_module.shared_beginning(model, inputs, index) == 20
    early = torch.cat([torch.tensor([17]), index])  # a target in the beginning
    assert batches_module.shared_beginning(model, inputs, early) == 17
    two = alike(2)
    few = batches_module.shared_beginning(
        model, {"input_ids": two["input_ids"]}, target_positions(two).index
    )
    assert few == 0
    masked = inputs | {"attention_mask": batch["attention_mask"]}
    assert batches_module.shared_beginning(model, masked, index) == 0  # padding on the left
    monkeypatch.setenv("KD_NOTES_CPU_KERNELS", "0")
    assert batches_module.shared_beginning(model, inputs, index) == 0
    monkeypatch.delenv("KD_NOTES_CPU_KERNELS")
    assert batches_module.shared_beginning(model.train(), inputs, index) == 0  # dropout
    model.eval().config.sliding_window = 8
    assert batches_module.shared_beginning(model, inputs, index) == 0


# ---------------------------------------------------------------- kills, resumes, checkpoints

SCRIPT = """
    import os, signal, sys, time
    sys.path.insert(0, sys.argv[1])
    from test_train import EXAMPLES, Rows, config, mean_loss, mini_model
    from kd_notes.training.state import Callback
    from kd_notes.training.loop import train
    class Plug(Callback):
        def on_step(self, loop):
            if loop.step == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(float(sys.argv[4]))
    cfg = config(max_steps=40, save_every=6, eval_every=9, keep_best=True, lr=5e-3)
    train(mini_model("causal", "xs", 64, 0, 0.1), Rows(), EXAMPLES, cfg, run_dir=sys.argv[2], validate=mean_loss, callbacks=[Plug()])
"""


def killed_training(folder, at_step, pause=0.0):
    script = [
        sys.executable,
        "-c",
        textwrap.dedent(SCRIPT),
        os.path.dirname(__file__),
        str(folder),
        str(at_step),
        str(pause),
    ]
    return subprocess.Popen(script, env=os.environ | {"OMP_NUM_THREADS": "1"})


def long_run(folder=None):
    return run(
        max_steps=40,
        save_every=6,
        eval_every=9,
        keep_best=True,
        lr=5e-3,
        dropout=0.1,
        run_dir=folder,
        validate=mean_loss,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return long_run(tmp_path_factory.mktemp("whole"))


def assert_same_run(a, b):
    def rows_of(result):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in result.history]

    assert (
        rows_of(a) == rows_of(b)
        and a.best == b.best
        and a.tokens == b.tokens
        and a.steps == b.steps
    )
    assert same_bits(a.model, b.model)


def test_kill_9_then_resume_ends_bit_identical(tmp_path, uninterrupted):
    process = killed_training(tmp_path, at_step=27)
    assert process.wait(400) == -signal.SIGKILL
    assert last_checkpoint(tmp_path).name == "step-0000024"
    resumed = long_run(tmp_path)
    assert_same_run(resumed, uninterrupted)
    on_disk = [
        {k: v for k, v in r.items() if k != "seconds"}
        for r in read_jsonl(tmp_path / "metrics.jsonl")
    ]
    assert on_disk == [
        {k: v for k, v in r.items() if k != "seconds"} for r in uninterrupted.history
    ]


def test_kills_at_arbitrary_moments(tmp_path, uninterrupted):
    "Killed from outside, twice, wherever it happens to be; the moments are random, the result is not."
    for extra in (0.0, 0.35):
        process = killed_training(tmp_path, at_step=-1, pause=0.05)
        before, deadline = last_checkpoint(tmp_path), time.monotonic() + 120
        while (
            last_checkpoint(tmp_path) == before
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        time.sleep(extra)
        process.kill()
        process.wait(30)
    assert_same_run(long_run(tmp_path), uninterrupted)


def test_without_a_run_dir_the_numbers_are_the_same(uninterrupted):
    assert_same_run(long_run(), uninterrupted)


def test_a_finished_run_is_read_not_trained_again(tmp_path):
    class Count(Callback):
        steps = 0

        def on_step(self, loop):
            Count.steps += 1

    a = run(run_dir=tmp_path, save_every=5, validate=mean_loss, keep_best=True, callbacks=[Count()])
    b = run(run_dir=tmp_path, save_every=5, validate=mean_loss, keep_best=True, callbacks=[Count()])
    assert Count.steps == 12 and b.steps == 12
    assert_same_run(a, b)


@pytest.mark.parametrize("eval_every", [0, 5])
@pytest.mark.parametrize("save_every", [4, 5, 7])
def test_a_finished_run_ends_the_same_wherever_its_last_validation_was(
    tmp_path, eval_every, save_every
):
    "The validation after the last step may come after the last checkpoint."

    class Scores(Callback):
        seen = ()

        def on_validate(self, loop, metrics):
            self.seen = (*self.seen, metrics["score"])

        def state(self):
            return {"seen": list(self.seen)}

        def load(self, state):
            self.seen = tuple(state["seen"])

    def once():
        scores = Scores()
        result = run(
            run_dir=tmp_path,
            save_every=save_every,
            eval_every=eval_every,
            validate=mean_loss,
            keep_best=True,
            callbacks=[scores],
        )
        return result, scores.seen

    first, scores = once()
    assert first.best["step"] == 12
    for _ in range(2):
        again, seen = once()
        assert_same_run(first, again)
        assert seen == scores
    on_disk = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in on_disk if "score" in row][-1:] == [12]


def test_a_checkpoint_that_does_not_say_when_it_validated_is_read_as_before(tmp_path):
    options = {"run_dir": tmp_path, "eval_every": 5, "validate": mean_loss, "keep_best": True}
    first = run(**options, save_every=5)
    state = last_checkpoint(tmp_path) / "state.json"
    kept = json.loads(state.read_text())
    assert kept.pop("validated") == 12
    state.write_text(json.dumps(kept))
    assert_same_run(first, run(**options, save_every=5))


def test_only_the_last_checkpoint_stays_and_holds_no_pickle(tmp_path):
    run(run_dir=tmp_path, save_every=5, validate=mean_loss, keep_best=True)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000012"]
    names = sorted(p.name for p in last_checkpoint(tmp_path).iterdir())
    assert names == [
        "best.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "rng-0.safetensors",
        "state.json",
    ]


def test_half_written_checkpoints_are_ignored(tmp_path):
    part = tmp_path / "checkpoints/.step-0000099.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(tmp_path) is None
    assert same_bits(run(run_dir=tmp_path, save_every=5).model, run().model)
    assert not part.exists()


@pytest.mark.parametrize("name", ["model", "optimizer", "rng-0"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_not_passed_over(tmp_path, name, damage):

    class Stop(Callback):
        def on_step(self, state):
            if state.step == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(run_dir=tmp_path, save_every=5, callbacks=[Stop()])
    file = last_checkpoint(tmp_path) / f"{name}.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        file.unlink()
    with pytest.raises(UserError, match=f"{name}.safetensors: the checkpoint cannot be read"):
        run(run_dir=tmp_path, save_every=5)


@pytest.mark.parametrize(
    "changes, setting",
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience"),  # nothing is ever validated
        ({"betas": (0.9, 1.5)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"max_steps": 10.5}, "max_steps"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(changes, setting):
    with pytest.raises(UserError, match=f"{setting}"):
        config(**changes)


def kd_rows(teacher=7, divergence="jsd", beta=0.5, **options):
    "KD on rows of ids; a new teacher each time, with the weights of its seed."
    if divergence == "jsd":
        options["beta"] = beta
    return KD(Rows().tokenizer, mini_model("causal", "s", VOCAB, teacher), divergence, **options)


OTHER_TOKEN = {**EXAMPLES[0], "prompt": [2, *EXAMPLES[0]["prompt"][1:-1], 9]}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"lr": 1e-3}, "settings"),
        ({"max_steps": 13}, "settings"),
        ({"batch_size": 4}, "settings"),
        ({"ema": 0.9}, "settings"),
        ({"examples": EXAMPLES[1:]}, "examples"),
        ({"examples": [OTHER_TOKEN, *EXAMPLES[1:]]}, "examples"),  # of the same length
        ({"examples": [EXAMPLES[1], EXAMPLES[0], *EXAMPLES[2:]]}, "examples"),
        ({"family": "t5"}, "student"),
        ({"seed": 1}, "student"),  # other first weights of the same shapes
        ({"dropout": 0.1}, "student"),
        ({"method": TwoTerms({"first": 1.0, "rest": 1.0})}, "method"),
        ({"method": FusedRows()}, "method"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    run(run_dir=tmp_path, save_every=5)
    with pytest.raises(UserError, match=f"a run with other .*{named}"):
        run(**{"run_dir": tmp_path, "save_every": 5} | change)


@pytest.mark.parametrize(
    "change",
    [
        {"divergence": "reverse_kl"},
        {"beta": 0.9},
        {"temperature": 4.0},
        {"teacher": 8},
        {"sft_weight": 0.5},
        {"vocabulary": 60},
    ],
)
def test_a_checkpoint_of_another_objective_or_teacher_is_refused(tmp_path, change):
    cfg = {"run_dir": tmp_path, "max_steps": 4, "save_every": 2, "examples": EXAMPLES[:24]}
    run(method=kd_rows(), **cfg)
    assert run(method=kd_rows(), **cfg).steps == 4  # the same call goes on
    with pytest.raises(UserError, match="a run with other method"):
        run(method=kd_rows(**change), **cfg)


def test_a_method_is_described_by_what_it_does_and_not_by_where_it_is():
    assert kd_rows().identity() == kd_rows().identity()
    first = kd_rows()
    with torch.no_grad():
        next(first.signal.model.parameters())[0, 0] += 1e-3
    assert first.identity() != kd_rows().identity()


def test_the_precision_of_a_teacher_belongs_to_its_description():
    half, widened = kd_rows(), kd_rows()
    half.signal.model.bfloat16()
    widened.signal.model.bfloat16().float()
    assert half.identity() != widened.identity()


def with_rotation(model, theta):
    "Return a copy with the same weights and another rotation of its positions."
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    other = type(model)(config)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "change", ["the student's config", "the teacher's config", "what is frozen"]
)
def test_a_checkpoint_of_the_same_weights_that_compute_or_learn_something_else_is_refused(
    tmp_path, change
):
    def resumed(theta=None, of_teacher=None, frozen=False):
        method = kd_rows()
        if of_teacher:
            method.signal.model = with_rotation(method.signal.model, of_teacher)
        student = mini_model("causal", "xs", VOCAB, 0)
        student = with_rotation(student, theta) if theta else student
        if frozen:
            student.get_input_embeddings().requires_grad_(False)
        cfg = config(max_steps=4, save_every=2)
        return train(student, method, EXAMPLES[:24], cfg, run_dir=tmp_path)

    resumed()
    assert resumed().steps == 4
    changes = {"theta": 3.0}, {"of_teacher": 3.0}, {"frozen": True}
    names = ["the student's config", "the teacher's config", "what is frozen"]
    with pytest.raises(UserError, match="a run with other"):
        resumed(**changes[names.index(change)])


class Vectors(Method):
    "Rows of many numbers instead of ids."

    def collate(self, items):
        return Batch({"x": torch.stack([torch.as_tensor(item["x"]) for item in items])})

    def token_counts(self, batch):
        return {"loss": len(batch["x"])}

    def loss_sums(self, model, batch):
        return {"loss": model(batch["x"]).square().sum()}


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_long_tensors_in_rows_are_told_apart_by_all_their_numbers(tmp_path, kind):
    "As text, torch and numpy abbreviate them: the middle is left out."
    first, second = torch.zeros(4, 2000), torch.zeros(4, 2000)
    second[:, 500:1500] = 1.0

    def resumed(values):
        rows = [{"x": x.numpy() if kind is np.ndarray else x} for x in values]
        torch.manual_seed(0)
        model = nn.Linear(2000, 1)
        return train(model, Vectors(), rows, config(save_every=2), run_dir=tmp_path)

    resumed(first)
    assert resumed(first).steps == 12
    with pytest.raises(UserError, match="a run with other examples"):
        resumed(second)


def test_adapters_outside_of_the_layers_are_refused():
    "Their virtual tokens are added by PEFT's wrapper, which targets are not computed with."
    from peft import get_peft_model, PromptTuningConfig

    soft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = get_peft_model(mini_model("causal", "xs", VOCAB, 0), soft)
    with pytest.raises(UserError, match="prompt tuning, which is not supported"):
        train(adapted, Rows(), EXAMPLES[:8], config(max_steps=1))
    with pytest.raises(UserError, match="prompt tuning, which is not supported"):
        target_logits(adapted, Rows().collate(EXAMPLES[:2]))


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_student_is_the_one_that_was_trained(tmp_path, targets, tied):
    "Merging into a head that is also the embeddings would change both (peft#2018)."
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    def base():
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(shape)

    cfg = config(max_steps=20, lr=3e-2, lora={"r": 4, "alpha": 8, "targets": targets})
    student = train(base(), Rows(), EXAMPLES, cfg).model
    ids = torch.tensor([EXAMPLES[0]["prompt"]])
    with torch.no_grad():
        measured = student(ids).logits
        adapter = save_model(student, tmp_path / "adapter")
        saved = save_model(merge_adapters(student), tmp_path / "whole")
        again = AutoModelForCausalLM.from_pretrained(saved).eval()
        torch.testing.assert_close(again(ids).logits, measured, atol=1e-4, rtol=1e-4)
        onto_base = _merge_adapter(base(), adapter).eval()
        torch.testing.assert_close(onto_base(ids).logits, measured, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "q", "lm_head"]])
def test_a_merged_encoder_decoder_is_the_one_that_was_trained(tmp_path, kind, targets):
    "BART's encoder and decoder share the head's weights too, and got random ones when loaded."
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    shape = {"vocab_size": VOCAB, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 2}
    if kind == "bart":
        shape |= {
            f"{side}_{name}": 2
            for side in ("encoder", "decoder")
            for name in ("layers", "attention_heads")
        }
        shape |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 128}
    else:
        shape |= {"d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **shape))
    student = add_lora(model, {"r": 4, "alpha": 8, "targets": targets}, seed=0).eval()
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        measured = student(input_ids=ids, decoder_input_ids=ids).logits
        saved = save_model(merge_adapters(student), tmp_path / "whole")
        again = AutoModelForSeq2SeqLM.from_pretrained(saved).eval()
        got = again(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(got, measured, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_would_never_be_read_is_refused():
    with pytest.raises(UserError, match="never be read"):
        add_lora(mini_model("t5", "xs", VOCAB, seed=0), {"targets": ["shared"]}, seed=0)


def test_settings_that_cannot_change_numbers_may_change(tmp_path):
    class Stop(Callback):
        def on_step(self, loop):
            if loop.step == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(run_dir=tmp_path, save_every=5, callbacks=[Stop()])
    resumed = run(
        run_dir=tmp_path, save_every=3, batch_size=4, gradient_accumulation_steps=2, log_every=4
    )
    for a, b in zip(resumed.model.parameters(), run().model.parameters()):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


class WordKD(KD):
    def encode(self, example):
        return Rows().encode(example)


def word_kd(divergence, **options):
    return WordKD(Rows().tokenizer, mini_model("causal", "xs", VOCAB, 7), divergence, **options)


def optional_divergences():
    found = {name: _options(DIVERGENCES[name]) for name in DIVERGENCES if name != "uld"}
    needed = {"target_ids", "labels"}
    return [n for n, o in found.items() if not {k for k, v in o.items() if v} - needed]


@pytest.mark.parametrize("divergence", optional_divergences())
def test_a_method_says_whether_the_split_of_a_step_matters(divergence):
    options = {"max_steps": 1, "bucket": False}
    parts = {"batch_size": 2, "gradient_accumulation_steps": 4}
    (whole,) = losses(run(method=word_kd(divergence), **options))
    (split,) = losses(run(method=word_kd(divergence), **options, **parts))
    assert word_kd(divergence).by_minibatch == (abs(split - whole) > 1e-4 * abs(whole))


def test_a_step_that_is_split_otherwise_is_refused_where_it_matters(tmp_path):
    cut = EasyHard(-1.0, 1, 1)
    assert not word_kd("atkd", split=cut).by_minibatch
    part = {"batch_size": 4, "gradient_accumulation_steps": 2}
    for name in ("atkd", "forward_kl"):
        folder = tmp_path / name
        options = {"run_dir": folder, "save_every": 6}
        run(method=word_kd(name), **options)
        if name == "forward_kl":
            run(method=word_kd(name), **options, **part)
            continue
        with pytest.raises(UserError, match="a run with other minibatches"):
            run(method=word_kd(name), **options, **part)
        state = last_checkpoint(folder) / "state.json"
        kept = json.loads(state.read_text())
        del kept["fingerprint"]["minibatches"]  # as an older version wrote it
        state.write_text(json.dumps(kept))
        run(method=word_kd(name), **options)
    parts = (Part("forward_kl"), Part("atkd", source="student"))
    for some in (parts, parts[:1]):
        method = GKD(Rows().tokenizer, mini_model("causal", "xs", VOCAB, 7), GKDConfig(parts=some))
        assert method.by_minibatch == (len(some) == 2)


def test_full_disk_keeps_the_checkpoint_before(tmp_path):
    "A real write error: the process may not write files beyond a size that the second checkpoint needs."
    code = f"""
        import resource, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_train import *
        class Shrink(Callback):
            def on_step(self, loop):
                if loop.step == 6: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try: run(run_dir={str(tmp_path)!r}, save_every=5, callbacks=[Shrink()])
        except UserError as e: print(e)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert "could not be written" in done.stdout and "Free some space" in done.stdout, done.stderr[
        -2000:
    ]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000005"]
    assert same_bits(run(run_dir=tmp_path, save_every=5).model, run().model)


def test_random_states_come_back():
    import numpy as np

    def draw():
        return random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist()

    draw()
    state = rng_state()
    first = draw(), draw()
    set_rng_state({k: v.clone() for k, v in state.items()})
    assert (draw(), draw()) == first


def test_callbacks_keep_their_state(tmp_path):
    class Sum(Callback):
        def __init__(self, stop_at=0):
            self.total, self.stop_at = 0, stop_at

        def on_step(self, loop):
            if loop.step == self.stop_at:
                raise KeyboardInterrupt
            self.total += loop.step

        def state(self):
            return {"total": self.total}

        def load(self, state):
            self.total = state["total"]

    with pytest.raises(KeyboardInterrupt):
        run(run_dir=tmp_path, save_every=5, callbacks=[Sum(stop_at=8)])
    counter = Sum()
    run(run_dir=tmp_path, save_every=5, callbacks=[counter])
    assert counter.total == sum(range(1, 13))


class _Steps(Callback):
    "Counts the steps, and stops at one of them."

    def __init__(self, stop_at=0):
        self.steps, self.stop_at = [], stop_at

    def on_step(self, loop):
        if loop.step == self.stop_at:
            raise KeyboardInterrupt
        self.steps.append(loop.step)

    def state(self):
        return {"steps": self.steps}

    def load(self, state):
        self.steps = state["steps"]


class _OddSteps(_Steps):
    def on_step(self, loop):
        self.steps += [loop.step] if loop.step % 2 else []


class _Quiet(Callback):
    pass


def test_what_a_callback_kept_goes_back_to_one_of_its_class(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(run_dir=tmp_path, save_every=5, callbacks=[_OddSteps(), _Quiet(), _Steps(stop_at=8)])
    for left in ([], [_Quiet()], [_Steps()]):
        with pytest.raises(UserError, match="has a callback _OddSteps"):
            run(run_dir=tmp_path, save_every=5, callbacks=left)
    every, odd, late = _Steps(), _OddSteps(), _Steps()
    run(run_dir=tmp_path, save_every=5, callbacks=[every, odd, late])
    assert every.steps == list(range(1, 13)) and odd.steps == list(range(1, 13, 2))
    assert late.steps == list(range(6, 13))  # it was not there before


# ---------------------------------------------------------------- validation


def test_best_weights_and_early_stopping():
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    seen = []

    def validate(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append([p.clone() for p in model.parameters()])
        return {"score": next(scores)}

    result = run(
        max_steps=50, eval_every=4, keep_best=True, early_stopping_patience=2, validate=validate
    )
    assert (
        result.best == {"step": 8, "score": 0.5}
        and result.steps == 16
        and "no better score" in result.stop
    )
    assert all(torch.equal(a, b) for a, b in zip(seen[1], result.model.parameters()))
    assert [r["score"] for r in result.history if "score" in r] == [0.1, 0.5, 0.4, 0.3]


def test_validation_does_not_disturb_training():
    def validate(model):
        torch.rand(100)
        return {"score": 0.0}

    a, b = run(dropout=0.2), run(dropout=0.2, eval_every=3, validate=validate)
    assert losses(a) == losses(b) and same_bits(a.model, b.model)


def test_validation_happens_at_the_end_and_needs_a_score():
    assert [r["step"] for r in run(validate=mean_loss).history if "score" in r] == [12]
    for wrong in (0.5, {}, {"score": math.nan}):
        with pytest.raises(UserError, match="finite 'score'"):
            run(validate=lambda model, wrong=wrong: wrong)


# ---------------------------------------------------------------- models


def test_tied_heads_stay_tied(tmp_path):
    for family in GOLDEN:
        result = run(family, run_dir=tmp_path / family, save_every=6)
        resumed = run(family, run_dir=tmp_path / family, save_every=6)
        for model in (result.model, resumed.model):
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = json.loads((last_checkpoint(tmp_path / "causal") / "state.json").read_text())
    assert names["step"] == 12


class FromTeacher(Rows):
    "Cross-entropy to a teacher's distribution: a method that owns a model."

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def loss_sums(self, model, batch):
        with torch.no_grad():
            wanted = target_logits(self.teacher, batch).softmax(-1)
        return {"loss": -(wanted * target_logits(model, batch).log_softmax(-1)).sum()}


def test_a_teacher_in_the_method_is_left_alone():
    teacher = mini_model("causal", "s", VOCAB, 7, dropout=0.3).eval()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}

    class Watch(Callback):
        def on_step(self, loop):
            assert not teacher.training and loop.model.training
            assert not {id(p) for p in loop.objective.parameters()} & {
                id(p) for p in teacher.parameters()
            }

    result = run(
        method=FromTeacher(teacher),
        callbacks=[Watch()],
        eval_every=4,
        validate=mean_loss,
        fsdp=True,
    )  # one process: nothing to split
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert losses(result)[-1] < losses(result)[0]


def test_frozen_parts_stay_and_a_frozen_model_is_an_error():
    model = mini_model("causal", "xs", VOCAB, 0)
    model.model.embed_tokens.requires_grad_(False)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, Rows(), EXAMPLES, config())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, start[k])}
    assert (
        "model.embed_tokens.weight" not in changed
        and "model.layers.0.mlp.up_proj.weight" in changed
    )
    with pytest.raises(UserError, match="asks for a gradient"):
        train(model.requires_grad_(False), Rows(), EXAMPLES, config())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_weights_that_learn_are_not_in_half_precision(kind):
    "Steps below 2^-9 of a weight would be rounded away."
    whole = mini_model("causal", "xs", VOCAB, 0).to(kind)
    mixed = mini_model("causal", "xs", VOCAB, 0)
    mixed.model.layers[1].to(kind)
    for model in (whole, mixed):
        with pytest.raises(UserError, match=rf"(?s)are in {kind}.*model\.float\(\)"):
            train(model, Rows(), None, config())  # refused before the rows are read
    train(whole.float(), Rows(), EXAMPLES, config(max_steps=1))
    adapted = train(whole.to(kind), Rows(), EXAMPLES, config(max_steps=1, lora={"r": 2})).model
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {kind}  # frozen


def test_lora_trains_saves_resumes_and_merges(tmp_path):
    def lora_run(folder=None, callbacks=()):
        model = mini_model("causal", "xs", VOCAB, 0)
        return train(
            model,
            Rows(),
            EXAMPLES,
            config(lora={"r": 4, "alpha": 8, "dropout": 0.1}, lr=1e-2, save_every=5),
            run_dir=folder,
            callbacks=callbacks,
        )

    class Stop(Callback):
        def on_step(self, loop):
            if loop.step == 7:
                raise KeyboardInterrupt

    whole = lora_run()
    with pytest.raises(KeyboardInterrupt):
        lora_run(tmp_path / "run", [Stop()])
    resumed = lora_run(tmp_path / "run")
    assert same_bits(whole.model, resumed.model)
    base = mini_model("causal", "xs", VOCAB, 0)
    for name, p in base.named_parameters():
        got = dict(whole.model.get_base_model().named_parameters())
        assert torch.equal(p, got.get(name, got.get(name.replace(".weight", ".base_layer.weight"))))
    saved = save_model(whole.model, tmp_path / "adapter")
    trained = sum(
        p.numel() for p in whole.model.parameters() if p.requires_grad
    )  # the file holds these in float32, and a header
    assert 4 * trained < (
        saved / "adapter_model.safetensors"
    ).stat().st_size < 4 * trained + 8_192 and not list(saved.glob("*.bin"))
    from peft import PeftModel

    merged = PeftModel.from_pretrained(base, str(saved)).merge_and_unload().eval()
    ids = torch.tensor([EXAMPLES[0]["prompt"]])
    torch.testing.assert_close(merged(ids).logits, whole.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert losses(whole)[-1] < losses(whole)[0]


def test_lora_names_must_exist():
    with pytest.raises(UserError, match=r"TrainConfig\.lora"):
        run(lora={"targets": ["no_such_layer"]})
    with pytest.raises(UserError, match="r, alpha, dropout"):
        config(lora={"rank": 8})


@pytest.mark.parametrize("family", GOLDEN)
def test_bfloat16_autocast_runs_and_keeps_float32_weights(family):
    plain, half = run(family), run(family, precision="bf16")
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert losses(half) == pytest.approx(losses(plain), rel=0.03) and losses(half) != losses(plain)
    assert losses(run(family)) == losses(
        plain
    )  # and the precision of one run does not leak into the next


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is fine on a GPU")
def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        run(precision="fp16")


def test_gradient_checkpointing_and_compilation_change_no_number():
    plain = losses(run(max_steps=3))
    assert losses(run(max_steps=3, compile="eager")) == pytest.approx(plain, rel=1e-5)
    calls, inner = [], type(mini_model("causal", "xs", VOCAB, 0).model.layers[0].mlp).forward

    def counted(self, *args, **kwargs):
        if self.training:
            calls.append(1)
        return inner(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(mini_model("causal", "xs", VOCAB, 0).model.layers[0].mlp), "forward", counted
        )
        run(max_steps=3)
        once, calls[:] = len(calls), []
        assert losses(run(max_steps=3, gradient_checkpointing=True)) == pytest.approx(
            plain, rel=1e-5
        )
    assert len(calls) == 2 * once  # every layer ran again in the backward pass
    lora = {"lora": {"r": 2}, "max_steps": 3}
    assert losses(run(**lora, gradient_checkpointing=True)) == pytest.approx(
        losses(run(**lora)), rel=1e-5
    )


def test_fused_sft_is_sft_without_logits(monkeypatch):
    plain, lean = Rows(), Rows()
    lean.fused = True
    batch = plain.collate([plain.encode(e) for e in EXAMPLES[:6]])
    found = []
    for method in (plain, lean):
        model = mini_model("causal", "xs", VOCAB, 0)
        loss = method.loss_sums(model, batch)["loss"]
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
        monkeypatch.setattr(
            batches_module, "target_logits", lambda *_: pytest.fail("the logits were computed")
        )
    torch.testing.assert_close(found[0], found[1])
    monkeypatch.undo()
    assert losses(run(max_steps=3, method=lean)) == pytest.approx(
        losses(run(max_steps=3)), rel=1e-4
    )


def test_a_target_without_a_prompt_is_an_error():
    "Its first token would be predicted by the last position of the row before."
    with pytest.raises(UserError, match="row 1 has no prompt"):
        causal_batch([([2, 4], [5, 1]), ([], [7, 8, 1])], 0)


def test_steps_that_fp16_leaves_out_for_good_end_the_training():
    state = state_module.TrainState(config(), Rows(), None)
    state.accelerator = type("Scaled", (), {"scaler": object()})
    state.optimizer = type("Skips", (), {"step_was_skipped": True})
    finite = loop_module.FiniteCheck(state)
    for _ in range(49):
        finite.count_skips()
    state.optimizer.step_was_skipped = False
    finite.count_skips()
    assert finite.skipped == 0  # one that was taken begins the count again
    state.optimizer.step_was_skipped = True
    with pytest.raises(UserError, match="50 steps in a row overflowed"):
        for _ in range(60):
            finite.count_skips()


def test_the_scale_of_fp16_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    "A real scaler on a CPU, whose first scales overflow: a resumed run must not skip steps again."
    scalers, make = [], training_setup.make_accelerator

    def scaled(cfg):
        accelerator = make(cfg)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        scalers.append(accelerator.scaler)
        return accelerator

    class Stop(Callback):
        def on_step(self, loop):
            if loop.step == 8:
                raise KeyboardInterrupt

    monkeypatch.setattr(training_setup, "make_accelerator", scaled)
    options = {"max_grad_norm": 0.0, "save_every": 5}
    whole = run(run_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(run_dir=tmp_path / "cut", callbacks=[Stop()], **options)
    resumed = run(run_dir=tmp_path / "cut", **options)
    assert scalers[0].state_dict() == scalers[2].state_dict()
    assert scalers[0].get_scale() < 2.0**127 and same_bits(whole.model, resumed.model)
    state = last_checkpoint(tmp_path / "cut") / "state.json"
    kept = json.loads(state.read_text())
    del kept["scaler"]  # as an older version wrote it
    state.write_text(json.dumps(kept))
    assert same_bits(whole.model, run(run_dir=tmp_path / "cut", **options).model)


def test_encoded_examples_wait_in_four_bytes_a_token_and_come_back_as_they_were():
    import tracemalloc
    from collections import namedtuple

    Pair = namedtuple("Pair", "a b")
    odd = [
        {"id": "x", "prompt": [1, 2**20], "none": [], "deep": [("label", [5, 6], [7])]},
        [1.5, 2],
        ("a", (1, 2)),
        7,
        Pair(1, [2]),
        [2**40],
        [True, 1],
    ]
    kept = batches_module.PackedItems()
    for item in odd:
        kept.append(item)
    assert (
        [kept[i] for i in range(len(odd))] == odd and type(kept[4]) is Pair and kept[6][0] is True
    )
    draw = random.Random(0)
    tracemalloc.start()
    rows = batches_module.PackedItems()
    for _ in range(1000):
        rows.append(
            {
                "prompt": [draw.randrange(50_000) for _ in range(150)],
                "completion": [draw.randrange(50_000) for _ in range(50)],
            }
        )
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / 200_000 < 7, size  # lists of integers take 36


class Sometimes(Rows):
    "A second term that only some examples have."

    loss_weights = {"loss": 0.5, "extra": 0.5}

    def token_counts(self, batch):
        return super().token_counts(batch) | {"extra": int((batch["input_ids"][:, 1] > 60).sum())}

    def loss_sums(self, model, batch):
        return super().loss_sums(model, batch) | {"extra": 0.0 * target_nll(model, batch).sum()}


def test_a_batch_may_lack_a_term_only_where_the_method_says_so():
    few = [e for e in EXAMPLES if e["prompt"][1] <= 60][:8]
    with pytest.raises(UserError, match="no target tokens for the term 'extra'"):
        run(max_steps=2, examples=few, method=Sometimes())
    method = Sometimes()
    method.optional_terms = frozenset({"extra"})
    assert all(math.isfinite(x) for x in losses(run(max_steps=2, examples=few, method=method)))
    method.loss_weights = {"loss": 0.0, "extra": 1.0}
    with pytest.raises(UserError, match="no target tokens"):  # nothing at all would be learned
        run(max_steps=2, examples=few, method=method)


def test_layer_dropped_students_train():
    student = layer_drop(mini_model("causal", "m", VOCAB, 0), 2)
    assert losses(train(student, Rows(), EXAMPLES, config(max_steps=30)))[-1] < 4


# ---------------------------------------------------------------- bad data and settings


def test_no_targets_no_examples_too_long():
    with pytest.raises(
        UserError, match=r"row-\d+.*step 1 has no target tokens for the term 'loss'"
    ):
        run(examples=[e | {"completion": []} for e in EXAMPLES])
    with pytest.raises(UserError, match="no training examples"):
        run(examples=[])
    with pytest.raises(UserError, match="row-3: the example has"):
        run(
            examples=EXAMPLES[:3] + [{"id": "row-3", "prompt": [5] * 40, "completion": [1]}],
            max_length=30,
        )
    assert run(examples=EXAMPLES, max_length=30, max_steps=1).steps == 1


class Poisoned(Rows):
    "The loss (or only its gradient) of rows with a certain token is not finite."

    def __init__(self, how):
        super().__init__()
        self.how = how

    def loss_sums(self, model, batch):
        nll = target_nll(model, batch).sum()
        if not (batch["input_ids"] == 63).any():
            return {"loss": nll}
        if self.how == "gradient":
            zero = (nll * 0).clamp(min=0)
            return {"loss": nll + zero.sqrt()}  # value 0, slope infinite times zero
        return {"loss": nll * math.inf}


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_non_finite_stops_with_step_and_examples_before_the_weights_are_touched(tmp_path, how):
    examples = [
        {
            **e,
            "prompt": [min(t, 62) for t in e["prompt"]],
            "completion": [min(t, 62) for t in e["completion"]],
        }
        for e in EXAMPLES
    ]
    examples[41] = {"id": "the-bad-one", "prompt": [2, 63, 3], "completion": [5, 1]}
    weights = []

    class Keep(Callback):
        def on_step(self, loop):
            weights[:] = [p.clone() for p in loop.model.parameters()]

    model = mini_model("causal", "xs", VOCAB, 0)
    with pytest.raises(UserError, match="not finite at step") as error:
        train(
            model,
            Poisoned(how),
            examples,
            config(max_steps=12, save_every=2),
            run_dir=tmp_path,
            callbacks=[Keep()],
        )
    order = batch_order([Rows().num_tokens(Rows().encode(e)) for e in examples], 8, 0)
    bad_step = next(i for i, b in enumerate(order, 1) if 41 in b)
    assert f"step {bad_step}." in str(error.value)
    assert (
        str(error.value).startswith("examples the-bad-one:")
        if how == "loss"
        else "the-bad-one" in str(error.value)
    )
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    assert last_checkpoint(tmp_path) is None or int(last_checkpoint(tmp_path).name[5:]) < bad_step


@pytest.mark.parametrize(
    "change",
    [
        {"max_steps": -1},
        {"batch_size": 0},
        {"lr": 0},
        {"gradient_accumulation_steps": 0},
        {"schedule": "step"},
        {"precision": "fp8"},
        {"warmup": -0.1},
        {"max_grad_norm": -1},
        {"log_every": 0},
    ],
)
def test_impossible_settings_name_themselves(change):
    with pytest.raises(UserError, match=f"TrainConfig.{next(iter(change))}"):
        config(**change)


def test_save_model_replaces_whole_folders(tmp_path):
    a, b = mini_model("causal", "xs", VOCAB, 0), mini_model("t5", "xs", VOCAB, 0)
    save_model(a, tmp_path / "m")
    (tmp_path / "m/stray.txt").write_text("from before")
    save_model(b, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and not (tmp_path / "m/stray.txt").exists()
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "t5"


@pytest.mark.parametrize("killed", [False, True])
def test_a_save_that_stops_between_two_renames_loses_no_model(tmp_path, monkeypatch, killed):
    a, b = mini_model("causal", "xs", VOCAB, 0), mini_model("t5", "xs", VOCAB, 0)
    save_model(a, tmp_path / "m")
    rename = os.replace

    def stop(source, target):
        if str(source).endswith(".part") and str(target).endswith("m"):
            raise KeyboardInterrupt
        rename(source, target)

    if killed:  # nothing tidies up: the old model stands under its other name
        rename(tmp_path / "m", tmp_path / ".m.old")
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_model(b, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "llama"


def test_a_checkpoint_is_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    events, flush, remove = [], os.fsync, shutil.rmtree

    def fsync(file):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        flush(file)

    def rmtree(path, **options):
        if os.path.isdir(path):
            events.append(f"gone: {os.path.basename(path)}")
        remove(path, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    run(run_dir=tmp_path, save_every=6)
    before = events[: events.index("gone: step-0000006")]
    for name in ("model.safetensors", "optimizer.safetensors", "rng-0.safetensors", "checkpoints"):
        assert before.count(name) == 2


# ---------------------------------------------------------------- averaged weights, trackers, memory


def test_average_of_the_weights_is_validated_kept_and_resumed(tmp_path):
    class Average(Callback):
        "The same average, by the formula."

        def on_start(self, loop):
            self.weights = [p.detach().clone() for p in loop.model.parameters()]

        def on_step(self, loop):
            decay = min(0.9, (1 + loop.step) / (10 + loop.step))
            for average, p in zip(self.weights, loop.model.parameters()):
                average.copy_(decay * average + (1 - decay) * p.detach())

    class Stop(Callback):
        def on_step(self, loop):
            if loop.step == 8:
                raise KeyboardInterrupt

    validated, average = [], Average()

    def validate(model):
        validated.append([p.clone() for p in model.parameters()])
        return {"score": float(len(validated))}

    with_average = run(ema=0.9, eval_every=4, validate=validate, callbacks=[average])
    assert losses(with_average) == losses(run())  # the training itself does not notice
    for mine, seen, kept in zip(
        average.weights, validated[-1], with_average.model.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, kept.detach(), atol=1e-6, rtol=1e-5)
        assert torch.equal(seen, kept)
    with pytest.raises(KeyboardInterrupt):
        run(ema=0.9, run_dir=tmp_path, save_every=5, callbacks=[Stop()])
    for _ in range(2):  # resumed, and read when finished
        assert same_bits(run(ema=0.9, run_dir=tmp_path, save_every=5).model, with_average.model)
    with pytest.raises(UserError, match=r"TrainConfig\.ema"):
        config(ema=1.0)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_average_moves_whatever_the_precision_of_the_weights(kind):
    "A share of 0.001 of a step is below the rounding of half precision."
    module = nn.Linear(8, 8).to(kind)
    average = WeightAverage(module, 0.999)
    exact = module.weight.detach().double().clone()
    draw = torch.Generator().manual_seed(0)
    for step in range(9000, 9300):
        with torch.no_grad():
            module.weight += 0.1 * torch.rand(8, 8, generator=draw).to(kind)
        average.update(step)
        exact.lerp_(module.weight.detach().double(), 0.001)
    own = module.weight.detach().clone()
    torch.testing.assert_close(average.weights["weight"].double(), exact, rtol=1e-5, atol=1e-5)
    with average.applied():
        assert torch.equal(module.weight, average.weights["weight"].to(kind))
    assert torch.equal(module.weight, own) and module.weight.dtype == kind


def test_best_of_the_averages_is_kept():
    scores, seen = iter([0.1, 0.9, 0.2]), []

    def validate(model):
        seen.append([p.clone() for p in model.parameters()])
        return {"score": next(scores)}

    result = run(ema=0.5, eval_every=4, keep_best=True, validate=validate)
    assert all(torch.equal(a, b) for a, b in zip(seen[1], result.model.parameters()))


def file_tracker():
    "A tracker of Accelerate's kind that writes lines of JSON."
    from accelerate.tracking import GeneralTracker

    class Lines(GeneralTracker):
        name, requires_logging_directory = "lines", False

        def __init__(self, path):
            super().__init__()
            self.path = path

        @property
        def tracker(self):
            return self.path

        def write(self, **row):
            with self.path.open("a") as f:
                f.write(json.dumps(row) + "\n")

        def store_init_configuration(self, values):
            self.write(config=values)

        def log(self, values, step=None, **options):
            self.write(step=step, **values)

        def finish(self):
            self.write(finished=True)

    return Lines


def test_trackers_get_every_row(tmp_path):
    tracker = state_module.Tracker(
        file_tracker()(tmp_path / "log.jsonl"), config={"note": "a test"}
    )
    result = run(callbacks=[tracker], log_every=3, eval_every=6, validate=mean_loss)
    first, *rows, last = read_jsonl(tmp_path / "log.jsonl")
    assert (
        first["config"]["lr"] == 2e-3
        and first["config"]["note"] == "a test"
        and last == {"finished": True}
    )
    assert [(r["step"], r.get("loss"), r.get("score")) for r in rows] == [
        (r["step"], r.get("loss"), r.get("score")) for r in result.history
    ]
    assert losses(result) == losses(run(log_every=3))


def test_a_tracker_that_accelerate_knows_by_name(tmp_path):
    pytest.importorskip("tensorboard")
    run(callbacks=[state_module.Tracker("tensorboard", project="board")], run_dir=tmp_path)
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("family", GOLDEN)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_saved_activations_are_counted_without_data(family, precision):
    model = mini_model(family, "s", VOCAB, 0)
    estimate = memory_module.memory_estimate(
        model.config, config(batch_size=8, precision=precision), length=48, targets=20
    )
    real = memory_module.saved_bytes(
        model, memory_module._uniform_batch(model.config, 8, 48, 20), precision
    )
    assert real <= estimate["activations"] <= 1.1 * real
    trained = 4 * sum(p.numel() for p in model.parameters())
    assert (estimate["weights"], estimate["gradients"], estimate["optimizer"]) == (
        trained,
        trained,
        2 * trained,
    )
    assert estimate["total"] == sum(v for k, v in estimate.items() if k != "total")


def test_memory_estimate_knows_the_settings():
    shape = mini_model("causal", "m", VOCAB, 0).config

    def estimate(processes=1, teacher=None, **changes):
        return memory_module.memory_estimate(
            shape, config(**changes), length=64, processes=processes, teacher=teacher
        )

    plain = estimate()
    assert (
        estimate(fsdp=True, processes=4)["optimizer"] == plain["optimizer"] // 4
        and estimate(processes=4) == plain
    )
    assert estimate(lora={"r": 2})["gradients"] < 0.1 * plain["gradients"]
    assert estimate(gradient_checkpointing=True)["activations"] < 0.5 * plain["activations"]
    assert estimate(batch_size=16)["activations"] == pytest.approx(
        2 * plain["activations"], rel=0.02
    )
    assert estimate(teacher=shape)["teacher"] > plain["weights"] > plain["teacher"] == 0
    assert estimate(teacher=[shape, shape])["teacher"] == 2 * estimate(teacher=shape)["teacher"]
    assert estimate(teacher=[]) == plain


PEAK = """
    import re, sys
    sys.path.insert(0, sys.argv[1])
    from test_train import *
    def status(name): return 1024*int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
    long = [{"prompt": [2], "completion": [5 + i % 50 for i in range(255)]} for _ in range(8)]
    def build(): return mini_model("causal", "m", 8192, 0)
    train(build(), Rows(), [EXAMPLES[0]]*2, config(max_steps=2, batch_size=2))  # libraries are loaded
    shape = build().config
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    train(build(), Rows(), long, config(max_steps=3, keep_memory=False))
    estimate = memory_module.memory_estimate(shape, config(), length=256)
    print(json.dumps([status("VmHWM") - before, estimate["total"]]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_estimate_is_near_the_measured_peak():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured, estimated = json.loads(done.stdout.splitlines()[-1])
    assert measured > 150e6 and 0.75 < measured / estimated < 1.25, (measured, estimated)


FAULTS = """
    import resource, sys, torch
    from contextlib import nullcontext
    from kd_notes.kernels import reused_memory
    def faults(megabytes):
        for number in range(8):
            if number == 3:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [torch.ones(250_000*megabytes) for _ in range(6)]  # freed together
            del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    with reused_memory() if sys.argv[1] == "kept" else nullcontext(False) as known:
        inside = faults(16)
    print(known, inside, faults(8))
"""


def test_reused_memory_saves_page_faults_and_changes_no_number():
    "In fresh processes with glibc's limit held at its lowest: how far it adapts by itself depends on what was freed before."

    def faults(how):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(FAULTS), how],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},
        )
        return done.stdout.split()

    known, kept, after = faults("kept")
    if known == "False":
        pytest.skip("not glibc")
    _, returned, never = faults("returned")
    assert int(kept) < 0.1 * int(returned)
    assert int(after) < 0.1 * int(never)  # what follows is not left at the lowest limit
    assert same_bits(run().model, run(keep_memory=False).model)


# ---------------------------------------------------------------- several processes

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "configs")
NOTEBOOK = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import test_train as t
    from accelerate import notebook_launcher
    notebook_launcher(t.one_of_two, (sys.argv[2], False), num_processes=2, use_port=sys.argv[3])
    notebook_launcher(t.one_of_two, (sys.argv[2], True), num_processes=2, use_port=sys.argv[4])
"""


def one_of_two(folder, fsdp):
    "What each of two processes does; called by Accelerate's notebook_launcher."
    from accelerate import PartialState
    from safetensors.torch import save_file

    folder = f"{folder}/{'fsdp' if fsdp else 'ddp'}"
    result = run(
        batch_size=2,
        gradient_accumulation_steps=2,
        run_dir=folder,
        save_every=6,
        eval_every=4,
        fsdp=fsdp,
        validate=mean_loss,
        ema=0.5 if fsdp else 0.0,
        method=TwoTerms({"first": 0.5, "rest": 2.0}),
    )
    assert PartialState().num_processes == 2 and torch.distributed.get_backend() == "gloo"
    assert all(hasattr(p, "full_tensor") == fsdp for p in result.model.parameters())
    assert result.model.get_output_embeddings().weight is result.model.get_input_embeddings().weight
    save_model(result.model, f"{folder}/saved-{0 if fsdp else PartialState().process_index}")
    weights = {
        k: (p.full_tensor() if fsdp else p.detach()).contiguous().clone()
        for k, p in result.model.named_parameters()
    }
    save_file(weights, f"{folder}/rank{PartialState().process_index}.safetensors")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


CPU = {
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="module")
def two_in_a_notebook(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    argv = [
        sys.executable,
        "-c",
        textwrap.dedent(NOTEBOOK),
        os.path.dirname(__file__),
        str(folder),
        free_port(),
        free_port(),
    ]
    done = subprocess.run(argv, env=os.environ | CPU, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_gloo_processes_equal_one(two_in_a_notebook, kind):
    "Plain data parallelism, and torch's fully_shard (FSDP2) with averaged weights; accumulation, two terms, validation in both."
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder, terms = two_in_a_notebook / kind, TwoTerms({"first": 0.5, "rest": 2.0})
    settings_ = {
        "batch_size": 8,
        "method": terms,
        "eval_every": 4,
        "validate": mean_loss,
        "ema": 0.5 if kind == "fsdp" else 0.0,
    }
    one, ranks = run(**settings_), [load_file(folder / f"rank{r}.safetensors") for r in range(2)]
    for name, p in one.model.named_parameters():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], p.detach(), atol=2e-4, rtol=1e-3)
    logged = read_jsonl(folder / "metrics.jsonl")
    assert [r["loss"] for r in logged if "loss" in r] == pytest.approx(losses(one), rel=2e-4)
    assert [r["score"] for r in logged if "score" in r] == pytest.approx(
        [r["score"] for r in one.history if "score" in r], rel=2e-4
    )
    assert [r.get("tokens") for r in logged] == [r.get("tokens") for r in one.history]
    assert {p.name for p in last_checkpoint(folder).iterdir()} >= {
        "rng-0.safetensors",
        "rng-1.safetensors",
    }
    resumed = run(
        run_dir=folder, save_every=6, **settings_
    )  # finished: one process reads what two wrote
    assert all(torch.equal(p, ranks[0][n]) for n, p in resumed.model.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(folder / "saved-0")
    assert (
        all(torch.equal(p, ranks[0][n]) for n, p in loaded.named_parameters())
        and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    )


def test_accelerate_launch_with_the_committed_configuration(tmp_path):
    script = tmp_path / "training.py"
    script.write_text(f"""
import atexit, os, sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_train import run
def left():
    names = [p.read_text() for p in Path("/proc/self/task").glob("*/comm")]
    Path({str(tmp_path)!r}, "left-" + os.environ["RANK"]).write_text("".join(names))
atexit.register(left)  # before the training: it runs after whatever the training leaves for the end
result = run("t5", batch_size=4, gradient_accumulation_steps=2, run_dir={str(tmp_path / "run")!r}, save_every=6)
from accelerate import PartialState
assert PartialState().num_processes == 2
""")
    argv = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"{CONFIGS}/cpu.yaml",
        str(script),
    ]
    done = subprocess.run(argv, env=os.environ | CPU, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    # a thread of gloo's that frees its last work while Python is ending aborts the process, about once in thirty launches
    assert all("gloo" not in (tmp_path / f"left-{rank}").read_text() for rank in range(2))
    one = run("t5", batch_size=16)
    assert [r["loss"] for r in read_jsonl(tmp_path / "run/metrics.jsonl")] == pytest.approx(
        losses(one), rel=2e-4
    )


@pytest.mark.parametrize("name", ["cpu", "ddp", "deepspeed"])
def test_configurations_are_what_accelerate_takes(name):
    "Not run here (but for cpu.yaml): parsed by Accelerate's own launcher, which refuses unknown keys, down to the environment it would set."
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    text = open(f"{CONFIGS}/{name}.yaml").read()
    assert ("not run here" in text) == (name != "cpu")
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", f"{CONFIGS}/{name}.yaml", "x.py"])
    )
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (
        name in ("cpu", "ddp"),
        False,
        name == "deepspeed",
    )
    known = vars(launch_command_parser().parse_args(["x.py"]))
    assert not set(defaults.deepspeed_config) - set(known)
    if name == "deepspeed":
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(args)[1]
        assert (
            environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
            and environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "1"
        )
    else:
        assert prepare_multi_gpu_env(args)


def test_accelerates_own_fsdp_is_refused(tmp_path):
    "Two gloo processes launched with --use_fsdp: the run stops before a step and names fsdp=True."
    script = tmp_path / "training.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_train import run
run(batch_size=4)
""")
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", f"{CONFIGS}/cpu.yaml", "--use_fsdp", "--fsdp_version", "2"]
    launch += ["--main_process_port", free_port(), str(script)]
    done = subprocess.run(launch, env=os.environ | CPU, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "UserError: FSDP of Accelerate: it is switched on" in done.stderr, done.stderr[-3000:]
    assert "TrainConfig(fsdp=True)" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"save_every": 5},
        {"ema": 0.9},
        {"keep_best": True},
        {"gradient_accumulation_steps": 2},
        {"fsdp": True},
    ],
)
def test_deepspeed_and_what_it_takes_away(change):
    "DeepSpeed is not installed here: only the refusal is tested, on an object with the two attributes that it looks at."
    from types import SimpleNamespace as Space

    plugin = Space(deepspeed_config={})
    accelerator = Space(
        distributed_type=Space(value="DEEPSPEED"), state=Space(deepspeed_plugin=plugin)
    )
    with pytest.raises(UserError, match="does not work with DeepSpeed"):
        training_setup._check_deepspeed(accelerator, config(**change))
    training_setup._check_deepspeed(accelerator, config(batch_size=4))
    assert plugin.deepspeed_config == {"train_micro_batch_size_per_gpu": 4}
