"""Scarce gold text: the division of the world, TAID, the experiment behind the map of regimes."""

import json
import math

import pytest
import torch

import kd_notes.experiments.scarce_world as scarce_world_module
from kd_notes.core import UserError
from kd_notes.data.regime import (
    check_regime,
    held_villages,
    is_held,
    pool_prompts,
    TEST_DRAWN,
    TEST_SEED,
    training_rows,
    validation_rows,
)
from kd_notes.data.regime import test_rows as regime_test
from kd_notes.data.world import draw_split, load_corpus, load_world, load_world_tokenizer
from kd_notes.experiments.base import UNTRAINED
from kd_notes.experiments.ladder import (
    LADDER,
    LADDER_ARMS,
    LadderStudents,
    RememberedTeacher,
    weight_profile,
)
from kd_notes.experiments.scarce_models import ScarceModels
from kd_notes.experiments.scarce_world import (
    LOWEST_STEPS,
    SCARCE_ARMS,
    scarce_cell,
    ScarceTexts,
    ScarceWorld,
)
from kd_notes.losses.divergences import forward_kl
from kd_notes.methods.logit_kd import KD
from kd_notes.methods.on_policy import minibatch_config
from kd_notes.methods.prompts import encode_prompts
from kd_notes.methods.registry import METHODS
from kd_notes.methods.taid import TAID, TAIDConfig
from kd_notes.models.mini import mini_model
from kd_notes.products.settings import check_objective
from kd_notes.runner.grid import ROW_LIMIT
from kd_notes.training.batches import target_logits
from kd_notes.training.loop import train

torch.set_num_threads(1)
TOKENIZER = load_world_tokenizer()
ROWS = load_world("train")[:32]
WORLD = ScarceWorld()


# ---------------------------------------------------------------- the division


def test_no_student_reads_a_held_out_village_and_nobody_a_prompt_of_a_test():
    counts = check_regime()
    assert counts["pool"] == 8000 and counts["students"] >= 2400 and counts["in domain"] == 300
    assert counts["out of domain"] >= 150 and len(held_villages()) == 10
    asked = {row["prompt"] for held in (False, True) for row in regime_test(held)}
    assert len(asked) == counts["in domain"] + counts["out of domain"]
    assert not asked & {prompt.text for prompt in pool_prompts()}
    for row in [*training_rows(800), *validation_rows()]:
        assert not any(village in row["prompt"].split() for village in held_villages())
    assert all(map(is_held, regime_test(True))) and not any(map(is_held, regime_test(False)))


def test_the_corpus_and_the_teacher_know_the_held_out_villages():
    corpus = " ".join(row["text"] for row in load_corpus())
    taught = " ".join(prompt.text for prompt in pool_prompts())
    for village in held_villages():
        assert corpus.count(village) > 50 and taught.count(village) > 50


def test_a_smaller_gold_set_is_part_of_a_larger_one():
    assert training_rows(800)[:100] == training_rows(100)
    everything = training_rows(600, known=False)
    known = [row for row in everything if not is_held(row)]
    assert len(known) > 400 and known == training_rows(800)[: len(known)]
    assert [row["prompt"] for row in everything] == [p.text for p in pool_prompts()[:600]]


def test_rows_are_those_of_the_generator_however_many_are_asked_for():
    drawn = draw_split("test", TEST_DRAWN, seed=TEST_SEED)
    for held in (True, False):
        few = regime_test(held, 3)
        assert few == regime_test(held)[:3]
        texts = {row["prompt"]: (row["response"], row["references"]) for row in drawn}
        assert all(
            texts[r["prompt"]] == (r["response"], r["references"]) for r in regime_test(held)
        )


def test_more_rows_than_there_are_is_an_error():
    with pytest.raises(UserError, match="not 9000"):
        training_rows(9000)
    with pytest.raises(UserError, match="not 0"):
        training_rows(0)


def test_no_kind_crowds_the_test_out_of_domain():
    kinds = [row["kind"] for row in regime_test(True)]
    assert "guest" not in kinds and len(set(kinds)) >= 5
    assert max(kinds.count(kind) for kind in kinds) / len(kinds) < 0.35


# ---------------------------------------------------------------- TAID


def small(seed):
    return mini_model("causal", "xxs", len(TOKENIZER), seed=seed)


def taid(**settings):
    return TAID(
        TOKENIZER, small(2), TAIDConfig(**({"rollouts": 8, "max_new_tokens": 24} | settings))
    )


def first_batch(method):
    "The first batch of a training that stops before it has trained."
    cfg = minibatch_config(8, 1, 1e-9)
    train(small(1), method, ROWS, cfg)
    rows = [row for part in method.rollouts.responses for row in part]
    from kd_notes.methods.rollouts import RolloutRow

    return method.collate([RolloutRow([response]) for response in rows])


def loss_at(t):
    method = taid()
    batch = first_batch(method)
    method.t = t
    student = small(1)
    loss = method.loss_sums(student, batch)["forward_kl"] / method.token_counts(batch)["forward_kl"]
    slopes = torch.autograd.grad(loss, list(student.parameters()), materialize_grads=True)
    return loss, torch.cat([slope.flatten() for slope in slopes]), student, method, batch


def test_taid_at_one_is_the_forward_kl():
    loss, slope, student, method, batch = loss_at(1.0)
    logits = target_logits(student, batch), target_logits(method.teacher, batch)
    plain = forward_kl(*logits)
    torch.testing.assert_close(loss, plain)
    theirs = torch.autograd.grad(plain, list(student.parameters()), materialize_grads=True)
    torch.testing.assert_close(slope, torch.cat([x.flatten() for x in theirs]))


def test_taid_at_zero_teaches_nothing():
    loss, slope, *_ = loss_at(0.0)
    assert abs(loss.item()) < 1e-6 and slope.abs().max() < 1e-6


def test_the_slope_of_taid_grows_with_the_teachers_share():
    norms = [loss_at(t)[1].norm().item() for t in (0.2, 0.5, 1.0)]
    assert norms == sorted(norms) and norms[0] > 0


def test_taid_runs_ahead_of_the_line_more_while_the_loss_falls():
    ends = []
    for losses in ([1.0, 0.5, 0.2], [1.0, 2.0, 4.0]):
        method = taid(pace=0.1, momentum=0.0)
        for loss in losses:
            method.advance(loss, 0.0)
        ends.append(method.t)
    assert ends[0] > ends[1] > 0.4
    method = taid(pace=0.0)
    method.advance(1.0, 0.0)
    method.advance(1.0, 0.5)
    assert method.t == pytest.approx(0.7)  # without pace it is the line
    method.advance(1.0, 0.1)
    assert method.t == pytest.approx(0.7)  # which it never leaves downwards


@pytest.mark.parametrize("batch_size", [8, 2])
def test_taids_pace_does_not_depend_on_gradient_accumulation(batch_size):
    method = taid(pace=0.9, momentum=0.5)
    cfg = minibatch_config(8, 6, 1e-3, batch_size=batch_size, bucket=False, log_every=1)
    train(small(1), method, ROWS, cfg)
    whole = taid(pace=0.9, momentum=0.5)
    train(small(1), whole, ROWS, minibatch_config(8, 6, 1e-3, bucket=False, log_every=1))
    assert method.t == pytest.approx(whole.t, abs=1e-6) and method.t > 0.4 + 0.6 * 4 / 6


def fine(model):
    return {"score": 0.0}


def test_taid_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path):
    settings = {"pace": 0.9, "momentum": 0.5}
    whole = taid(**settings)
    cfg = minibatch_config(8, 8, 1e-3, log_every=1, save_every=4, eval_every=6)
    straight = train(small(1), whole, ROWS, cfg, run_dir=tmp_path / "whole", validate=fine)

    def stop(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(1), taid(**settings), ROWS, cfg, run_dir=tmp_path / "cut", validate=stop)
    resumed = taid(**settings)
    again = train(small(1), resumed, ROWS, cfg, run_dir=tmp_path / "cut", validate=fine)
    assert resumed.t == whole.t and resumed.last_loss == whole.last_loss
    for a, b in zip(straight.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "wrong",
    [
        {"t_start": 1.2},
        {"t_start": 0.6, "t_end": 0.5},
        {"t_end": 1.1},
        {"pace": -1.0},
        {"momentum": 1.0},
        {"parts": [{"divergence": "reverse_kl"}]},
        {"parts": [{"divergence": "forward_kl"}, {"divergence": "nll"}]},
    ],
)
def test_settings_that_taid_cannot_have(wrong):
    with pytest.raises(UserError):
        TAIDConfig(**wrong)


# ---------------------------------------------------------------- the experiment


def test_every_arm_has_complete_parameters_and_the_same_budget():
    runs = [WORLD.parameters(arm=arm, seed=0, lr=0.001) for arm in SCARCE_ARMS]
    for run, arm in zip(runs, SCARCE_ARMS.values()):
        assert arm.method in METHODS and WORLD.modules(run)
        assert run["steps"] == (250 if arm.from_corpus else WORLD.Settings.steps)
        assert run["start"]["steps"] == (0 if arm.from_corpus else 480)
    assert len({run["minibatch"] for run in runs}) == 1
    for arm in UNTRAINED:
        run = WORLD.parameters(arm=arm, seed=0)
        assert run["lr"] == 0.0 and run["steps"] == 0


def test_points_of_the_map_differ_only_where_they_say():
    here = WORLD.parameters(arm="sft", seed=0, lr=0.001, **scarce_cell())
    assert here == WORLD.parameters(arm="sft", seed=0, lr=0.001)
    weak = WORLD.parameters(arm="sft", seed=0, lr=0.001, **scarce_cell(teacher_rows=2400))
    assert weak["start"] == here["start"] and weak["teacher"]["rows"] == 2400
    longer = WORLD.parameters(arm="sft", seed=0, lr=0.001, **scarce_cell(epochs=20))
    assert longer["start"]["steps"] == 250 and longer["start"]["stop"] == "last"
    for rows in LOWEST_STEPS:
        assert (
            WORLD.parameters(arm="sft", seed=0, lr=0.001, **scarce_cell(rows))["start"]["rows"]
            == rows
        )


def test_a_number_of_rows_without_a_known_lowest_loss_is_one_clear_error():
    with pytest.raises(UserError, match="200 rows.*100, 400, 1600"):
        scarce_cell(rows=200)
    assert scarce_cell(rows=200, epochs=16)["start"]["steps"] == 100


def test_one_reader_for_all_finetunings_and_teachers_before_students():
    models = ScarceModels()
    runs = [WORLD.parameters(arm="sft", seed=3, lr=0.1, **scarce_cell(epochs=e)) for e in (1, 20)]
    [(experiment, needed)] = WORLD.before(runs)
    assert experiment.name == "scarce_model" and len(needed) == 4
    [(_, readers)] = models.before(needed)
    assert {(run["size"], run["seed"], run["steps"]) for run in readers} == {
        ("m", 0, 0),
        ("xs", 3, 0),
    }
    assert models.before(readers) == []


TINY = {
    "steps": 5,
    "max_new_tokens": 12,
    "rows": 100,
    "teacher": {"size": "xxs", "read": 3, "rows": 64, "steps": 4},
    "start": {"read": 3, "steps": 4},
}


def test_a_run_measures_both_tests_and_fits_into_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    run = WORLD.parameters(arm="minillm", seed=0, lr=0.001, size="xxs", **TINY)
    [result] = WORLD.results([run])
    metrics = result["metrics"]
    # a trained student writes no shorter row: its packed scores have the same length
    assert len(json.dumps(metrics).encode()) <= ROW_LIMIT - 100
    assert all(math.isfinite(x) for x in metrics.values() if isinstance(x, float))
    for name in ("rouge_l", "rouge_l_greedy", "possible", "overlap", "teacher_agrees"):
        assert 0 <= metrics[name] <= 1 and 0 <= metrics[f"out_{name}"] <= 1
    assert metrics["train_clipped"] >= 0 and metrics["tokens_mixed"] > 0
    texts = ScarceTexts()
    [written] = texts.results([texts.parameters(student=run)])
    assert len(written["metrics"]["texts"]) == 5
    few = TINY | {"valid_rows": 4}
    grid = WORLD.parameters(arm="sft", seed=0, lr=0.001, size="xxs", score_on="validation", **few)
    [result] = WORLD.results([grid])
    assert "valid_rouge_l" in result["metrics"] and "rouge_l" not in result["metrics"]


def test_a_rate_that_silences_the_student_is_an_answer_of_the_grid_and_an_error_elsewhere(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    world = ScarceWorld()
    model = mini_model("causal", "xxs", len(TOKENIZER), seed=0)
    with torch.no_grad():  # it says the end token, whatever it has read
        for parameter in model.parameters():
            parameter.zero_()
        bias = model.get_output_embeddings()
        bias.bias = torch.nn.Parameter(torch.zeros(len(TOKENIZER)))
        bias.bias[TOKENIZER.eos_token_id] = 50.0
    few = TINY | {"valid_rows": 4}
    run = world.parameters(arm="on_policy_kd", seed=0, lr=0.001, score_on="validation", **few)
    student, metrics = scarce_world_module.distil_scarce(run, model, small(2), tmp_path / "a")
    assert metrics["collapsed"] == 1 and metrics["valid_rouge_l"] == 0 and student is model
    with pytest.raises(UserError, match="silence"):
        run = world.parameters(arm="on_policy_kd", seed=0, lr=0.001, **few)
        scarce_world_module.distil_scarce(run, model, small(2), tmp_path / "b")


# ---------------------------------------------------------------- the ladder of teachers


@pytest.mark.parametrize("arm", [name for name, arm in LADDER_ARMS.items() if arm.kd])
def test_a_remembered_teacher_gives_the_loss_and_gradient_of_a_live_one(arm):
    teacher = mini_model("causal", "xs", len(TOKENIZER), seed=0).double()
    student = mini_model("causal", "xxs", len(TOKENIZER), seed=1).double()
    rows = encode_prompts(TOKENIZER, ROWS[:6])
    found = []
    for signal in (teacher, RememberedTeacher(teacher, TOKENIZER.pad_token_id)):
        method = KD(TOKENIZER, signal, **LADDER_ARMS[arm].kd)
        items = [method.encode(row) for row in rows]
        student.zero_grad()
        loss = method.loss_sums(student, method.collate([items[i] for i in (4, 0, 3)]))["kd"]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in student.parameters())])
    for live, remembered in zip(*found):
        assert torch.allclose(live, remembered, rtol=1e-6, atol=1e-9)


def test_a_profile_of_weights_counts_every_token_and_finds_the_fixed_mean():
    p = torch.tensor([0.6, 0.2, 0.1, 0.1], dtype=torch.float64)
    one_way = torch.tensor([0.4, 0.25, 0.2, 0.15], dtype=torch.float64)  # head low, tail high
    mixed = torch.tensor([0.5, 0.15, 0.25, 0.1], dtype=torch.float64)
    seen = weight_profile(torch.stack([one_way, mixed, p]).log(), p.expand(3, 4).log())
    for boundary in ("official", "crossing-in-head"):
        assert sum(seen[boundary]["counts"]) == 3 and seen["sure"] == 1.0
        assert seen[boundary]["half"] == pytest.approx(2 / 3, abs=1e-3)
        assert seen[boundary]["below"] == pytest.approx(1 / 3, abs=1e-3)


def test_the_ladder_differs_in_the_teacher_alone():
    ladder = LadderStudents()
    runs = [ladder.parameters(arm="atkd", seed=0, lr=0.01, rung=rung) for rung in LADDER]
    assert len({json.dumps(run["teacher"]) for run in runs}) == len(LADDER) >= 4
    assert len({json.dumps({**run, "teacher": 0, "rung": 0}) for run in runs}) == 1
    assert runs[-1]["teacher"] == WORLD.parameters(arm="sft", seed=0, lr=0.01)["teacher"]
    assert "losses.decoupled" in ladder.modules(runs[0])
    for wrong in ({"rung": "xxl"}, {"score_on": "train"}, {"arm": "none"}):
        with pytest.raises(UserError):
            ladder.parameters(**{"arm": "atkd", "seed": 0} | wrong)


def test_the_product_takes_the_options_of_both_losses():
    assert check_objective("akl", {"flipped": True}) == "adaptive_kl"
    assert check_objective("atkd", {"reverse": True, "hard_fraction": 0.7}) == "atkd"
    with pytest.raises(UserError):
        check_objective("akl", {"reverse": True})
