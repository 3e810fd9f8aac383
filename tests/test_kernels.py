"""The tricks for the CPU: one switch, and no number depends on it further than its docstring says."""

import pytest
import torch

import kd_notes.kernels as kernels
from kd_notes.environment import cpu_kernels_on, SWITCH
from kd_notes.kernels import big_zeros, packed, reused_memory
from kd_notes.losses.fused import fused_linear_divergence
from kd_notes.models.mini import mini_model
from kd_notes.runner.code import run_key
from kd_notes.training.batches import causal_batch
from kd_notes.training.loop import train
from kd_notes.training.method import Method
from kd_notes.training.state import TrainConfig


class Rows(Method):
    "Cross-entropy of rows of ids, in the model's own loss."

    def collate(self, items):
        return causal_batch([(row["prompt"], row["completion"]) for row in items], 0)

    def token_counts(self, batch):
        return {"loss": int((batch["labels"] != -100).sum())}

    def loss_sums(self, model, batch):
        return {"loss": model(**batch).loss * self.token_counts(batch)["loss"]}


def both_ways(monkeypatch, function):
    "What the function gives with the switch off and on."
    found = []
    for state in "01":
        monkeypatch.setenv(SWITCH, state)
        found.append(function())
    return found


def test_the_switch_is_on_unless_it_is_zero(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    assert cpu_kernels_on()
    monkeypatch.setenv(SWITCH, "0")
    assert not cpu_kernels_on()
    monkeypatch.setenv(SWITCH, "1")
    assert cpu_kernels_on()


def test_off_means_that_no_trick_is_used(monkeypatch):
    monkeypatch.setattr(kernels, "PACK_FROM", 1000)
    model = mini_model("causal", "s", 300, seed=0).eval()
    monkeypatch.setattr(kernels.mmap, "mmap", lambda *_, **__: pytest.fail("memory was mapped"))
    monkeypatch.setenv(SWITCH, "0")
    assert not big_zeros(2**22).any()
    with packed(model), reused_memory() as known:
        assert not known and not any("forward" in vars(m) for m in model.modules())


def test_big_zeros():
    x = big_zeros(2**21 + 1, 2, dtype=torch.float32)
    assert x.shape == (2**21 + 1, 2) and not x.any() and x.is_contiguous()
    x.requires_grad_().sum().backward()
    assert x.grad.all() and torch.nn.Parameter(x).add(1).sum() > 0
    assert big_zeros(3, dtype=torch.float64).dtype == torch.float64


def test_huge_pages_change_no_bit_of_a_fused_loss(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=draw).requires_grad_()
    weight = torch.randn(40_000, 64, generator=draw).requires_grad_()  # 10 MB: above the limit
    teacher = torch.randn(40, 64, generator=draw)

    def loss_and_gradients():
        loss = fused_linear_divergence(hidden, weight, teacher, weight.detach())
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    for off, on in zip(*both_ways(monkeypatch, loss_and_gradients), strict=True):
        assert torch.equal(off, on)


def test_kept_memory_changes_no_bit_of_a_training_run(monkeypatch):
    rows = [{"prompt": [2, i], "completion": [i + 1, 1]} for i in range(4, 36)]
    config = TrainConfig(max_steps=4, batch_size=8, lr=1e-2, log_every=1, device="cpu")

    def trained():
        return train(mini_model("causal", "xs", 40, 0), Rows(), rows, config)

    off, on = both_ways(monkeypatch, trained)
    pairs = zip(off.model.parameters(), on.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [r["loss"] for r in off.history] == [r["loss"] for r in on.history]


def test_packed_weights_give_the_same_numbers_and_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(kernels, "PACK_FROM", 1000)
    model, ids = mini_model("causal", "s", 300, seed=0).eval(), torch.randint(0, 300, (8, 6))
    assert (
        kernels._can_pack() and len(kernels._packable(model)) == 22
    )  # 3 layers of 7, and the head
    with torch.no_grad():
        plain = model(ids).logits
        with packed(model):
            assert (model(ids).logits - plain).abs().max() < 1e-4
            assert all(
                m.forward.__name__ == "<lambda>"
                for m in model.modules()
                if type(m) is torch.nn.Linear
            )
        for p in model.parameters():
            p.mul_(1.5)  # an optimizer's step: the next packing must see it
        with packed(model):
            assert (model(ids).logits - plain).abs().max() > 0.01
    assert not any("forward" in vars(m) for m in model.modules())
    assert kernels._packable(model.double()) == []


def test_a_run_with_the_switch_off_has_another_key(monkeypatch):
    def key():
        return run_key("s", {"seed": 0}, ["core"])

    off, on = both_ways(monkeypatch, key)
    monkeypatch.delenv(SWITCH)
    assert off != on == key()
