"""Operations of recorded trainings: the rule of one pass, the settings they rest on, every system."""

import csv

import pytest
import torch

from kd_notes.core import data_dir
from kd_notes.data.images import task_images
from kd_notes.experiments import balanced_intents, images
from kd_notes.experiments.images import ImageStudents, LearnLabels, Network
from kd_notes.experiments.operations import (
    forward_flops,
    HEAD_ROWS,
    image_work,
    LEARN,
    PICTURES,
    scoring_work,
    STATE,
    stepwise_work,
    SYSTEM_WORK,
    system_operations,
)
from kd_notes.experiments.scoring import Scoring


def test_operations_of_a_network_are_two_for_each_weight():
    model = Network(8, [16, 12], 0)
    weights = 64 * 16 + 16 * 12 + 12 * 10
    assert forward_flops(model, torch.zeros(5, 8, 8)) == 2 * 5 * weights
    assert model.training


def test_a_run_on_pictures_by_hand():
    kind = ImageStudents()
    run = kind.parameters(arm="kd", lr=0.01, rows=40, steps=7)
    weights = 64 * 16 + 16 * 16 + 16 * 10
    work = image_work(run, {})
    assert work["student learns"] == 3 * 2 * weights * 7 * 40
    assert work["teacher reads"] == 2 * (64 * 192 + 192 * 192 + 192 * 10) * 40
    assert "teacher reads" not in image_work(run | {"arm": "hard"}, {})


def test_the_minibatches_are_those_of_the_trainings(monkeypatch):
    seen = []
    monkeypatch.setattr(images, "train", lambda model, method, rows, cfg: seen.append(cfg))
    pool = task_images("digits", "pool")
    for count in (40, 1000):
        images.fit(Network(8, [4], 0), LearnLabels(pool), count, max_steps=1, lr=0.1)
    assert [cfg.batch_size for cfg in seen] == [40, PICTURES]

    class Done:
        model = None

    monkeypatch.setattr(
        balanced_intents, "train", lambda model, method, rows, cfg: seen.append(cfg) or Done
    )
    intents = object.__new__(balanced_intents.Intents)
    intents.run, intents.names = {"seed": 0}, ["a", "b"]
    intents.fit(None, [], 1, 0.1)
    assert seen[-1].batch_size == HEAD_ROWS


def test_states_have_the_width_of_smollm2():
    from kd_notes.experiments.scoring import lower_layers

    assert lower_layers(1)[0].config.hidden_size == STATE


def test_tokens_are_learnt_at_six_operations_a_parameter():
    assert stepwise_work({}, {"parameters": 10, "tokens": 7}) == {"student learns": 6 * 10 * 7}
    assert LEARN == 3


def test_real_answers_cannot_be_counted_and_a_teacher_adds_its_reading():
    kind = Scoring()
    runs = [kind.parameters(arm=a, data="science", seed=0, lr=0.01) for a in ("alone", "kd")]
    alone, taught = (scoring_work(run, {}) for run in runs)
    assert alone["student learns"] == taught["student learns"]
    assert 0 < taught["teacher reads"] < taught["student learns"]
    assert scoring_work(runs[0] | {"data": "beetle"}, {}) == {}


with open(data_dir() / "landscape_systems.csv", encoding="utf-8", newline="") as file:
    SYSTEMS = list(csv.DictReader(file))


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s["system"])
def test_every_system_of_the_landscape_is_counted(system):
    found = system_operations(system["record"], system["arm"], system["baseline"])
    assert found["n"] >= 5 and 0.99 <= found["ratio"] < 10 and 0 < found.get("teacher", 0.5) < 1
    assert found["formula"] == SYSTEM_WORK[system["record"]][1]
    assert ("operations" in found) == (system["system"] != "MMIDR")
    assert ("teacher" in found) == (system["system"] not in ("MMIDR", "step-by-step"))
