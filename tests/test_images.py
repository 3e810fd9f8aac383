"""Pictures and classic distillation: the sets, the losses against a second derivation, hints, and students as runs."""

import pytest
import torch
import torch.nn.functional as F

from kd_notes.core import UserError
from kd_notes.data.images import (
    CROWDED,
    crowded_images,
    digit_images,
    digits_checksum,
    Images,
    SPLITS,
    task_images,
    TASKS,
)
from kd_notes.experiments.images import (
    fit,
    FitNetsKD,
    Guided,
    IMAGE_ARMS,
    ImageKD,
    ImageStudents,
    ImageTeachers,
    LearnLabels,
    Network,
    right_answers,
    shuffle_wrong,
    StoredLogits,
    StoredStates,
    TEACHERS,
)


@pytest.fixture(scope="module")
def some() -> Images:
    pool = task_images("digits", "pool")
    return Images(pool.pixels[:32], pool.labels[:32])


@pytest.fixture(scope="module")
def teacher_logits() -> torch.Tensor:
    return 3 * torch.randn(32, 10, generator=torch.Generator().manual_seed(1))


def loss_of(method, model, items=range(32)) -> torch.Tensor:
    "The total loss of a batch, as the loop computes it, a scalar."
    batch = method.collate(list(items))
    counts = method.token_counts(batch)
    sums = method.loss_sums(model, batch)
    return sum(method.loss_weights[term] * sums[term] / counts[term] for term in sums)


# --- the sets ---------------------------------------------------------------------------------------------------------------------


def test_splits_of_the_digits_share_no_picture():
    splits = [{tuple(p.flatten().tolist()) for p in digit_images(s).pixels} for s in SPLITS]
    assert sum(len(digit_images(s).labels) for s in SPLITS) == 1797
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    assert set(digit_images("test").labels.tolist()) == set(range(10))


def test_crowded_pictures_are_the_same_each_time_and_differ_between_splits():
    again = crowded_images.__wrapped__("validation")
    assert torch.equal(again.pixels, crowded_images("validation").pixels)
    assert torch.equal(again.labels, crowded_images("validation").labels)
    for split, count in CROWDED.items():
        images = crowded_images(split)
        assert images.pixels.shape == (count, 12, 12) and len(images.labels) == count
        assert 0 <= images.pixels.min() and images.pixels.max() <= 1
    assert not torch.equal(crowded_images("test").pixels, crowded_images("validation").pixels)


def test_the_label_of_a_crowded_picture_is_its_brighter_digit():
    "The nearest picture of the pool knows most of them; of the fainter digit it would know a tenth."
    pool, test = crowded_images("pool"), crowded_images("validation")
    near = torch.cdist(test.pixels.flatten(1), pool.pixels.flatten(1)).argmin(-1)
    assert (pool.labels[near] == test.labels).double().mean() > 0.7


@pytest.mark.parametrize("task, split", [("letters", "test"), ("digits", "train")])
def test_an_unknown_set_or_split_is_refused_with_the_known_ones(task, split):
    with pytest.raises(UserError, match="Choose one of") as caught:
        task_images(task, split)
    assert all(name in str(caught.value) for name in (SPLITS if task in TASKS else TASKS))


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    from kd_notes.data import images

    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="sklearn"):
        images._all_digits.__wrapped__()


def test_the_checksum_is_that_of_the_pixels():
    assert digits_checksum() == digits_checksum() and len(digits_checksum()) == 64


# --- the losses -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_on_pictures_is_the_formula_of_hinton(some, teacher_logits, temperature):
    model = Network(8, [16, 16], 0)
    method = ImageKD(some, StoredLogits(teacher_logits), temperature=temperature, sft_weight=0.1)
    logits = model(some.pixels)
    p = (teacher_logits / temperature).softmax(-1)
    q = (logits / temperature).log_softmax(-1)
    soft = (p * (p.log() - q)).sum(-1).mean()
    wanted = 0.9 * temperature**2 * soft + 0.1 * F.cross_entropy(logits, some.labels)
    assert float(loss_of(method, model).detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


class FreeLogits(torch.nn.Module):
    "A model whose logits are its parameters, whatever the pictures."

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.logits


@pytest.mark.parametrize("temperature", [1.0, 4.0, 100.0])
def test_the_gradient_of_kd_is_t_times_the_difference_of_the_softened_rows(
    some, teacher_logits, temperature
):
    "T^2 (q - p) / T, over the number of pictures; for high T the distance of centred logits."
    model = FreeLogits(torch.randn(32, 10, generator=torch.Generator().manual_seed(2)))
    method = ImageKD(some, StoredLogits(teacher_logits), temperature=temperature)
    loss_of(method, model).backward()
    z = model.logits.detach()
    q, p = ((x / temperature).softmax(-1) for x in (z, teacher_logits))
    assert torch.allclose(model.logits.grad, temperature * (q - p) / 32, atol=1e-6)
    if temperature == 100.0:
        apart = z - teacher_logits
        apart = apart - apart.mean(-1, keepdim=True)
        near = torch.linalg.vector_norm(32 * model.logits.grad - apart / 10)
        assert near < 0.05 * torch.linalg.vector_norm(apart / 10)


def test_a_cold_teacher_names_its_first_choice(some, teacher_logits):
    model = Network(8, [16, 16], 0)
    method = ImageKD(some, StoredLogits(teacher_logits), temperature=0.01)
    choice = teacher_logits.argmax(-1)
    wanted = 1e-4 * F.cross_entropy(model(some.pixels) / 0.01, choice)
    assert float(loss_of(method, model).detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)


def test_a_teacher_of_certain_labels_teaches_the_labels(some):
    certain = 50.0 * F.one_hot(some.labels, 10).float()
    model = Network(8, [16, 16], 0)
    method = ImageKD(some, StoredLogits(certain))
    assert float(loss_of(method, model).detach()) == pytest.approx(
        float(loss_of(LearnLabels(some), model).detach()), rel=1e-5
    )


def test_the_student_as_its_own_teacher_has_no_loss_and_no_gradient(some):
    model = Network(8, [16, 16], 0)
    for options in ({}, {"divergence": "dkd", "alpha": 1.0, "beta": 8.0}):
        method = ImageKD(some, StoredLogits(model(some.pixels)), temperature=4.0, **options)
        loss = loss_of(method, model)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert (
            abs(float(loss.detach())) < 1e-5 and max(float(g.abs().max()) for g in gradients) < 1e-5
        )


def test_the_two_parts_of_the_split_add_up_to_kd(some, teacher_logits):
    "Per picture: KL = target part + (1 - p_right) non-target part, p_right at the temperature."
    model = Network(8, [16, 16], 0)

    def per_picture(**options):
        method = ImageKD(some, StoredLogits(teacher_logits), temperature=4.0, **options)
        return torch.tensor([float(loss_of(method, model, [i]).detach()) for i in range(32)])

    target = per_picture(divergence="dkd", alpha=1.0, beta=0.0)
    others = per_picture(divergence="dkd", alpha=0.0, beta=1.0)
    p = (teacher_logits / 4).softmax(-1).gather(-1, some.labels[:, None])[:, 0]
    assert torch.allclose(per_picture(), target + (1 - p) * others, atol=1e-4)


def test_label_smoothing_is_cross_entropy_to_a_smoothed_row(some):
    model = Network(8, [16, 16], 0)
    rows = 0.9 * F.one_hot(some.labels, 10).float() + 0.01
    wanted = F.cross_entropy(model(some.pixels), rows)
    assert float(loss_of(LearnLabels(some, 0.1), model).detach()) == pytest.approx(
        float(wanted.detach()), rel=1e-5
    )


def test_shuffling_keeps_the_right_class_and_moves_the_others(some, teacher_logits):
    mixed = shuffle_wrong(teacher_logits, some.labels, 0)
    right = some.labels[:, None]
    assert torch.equal(mixed.gather(1, right), teacher_logits.gather(1, right))
    assert torch.equal(mixed.sort(-1).values, teacher_logits.sort(-1).values)
    assert (mixed != teacher_logits).double().mean() > 0.7
    assert torch.equal(mixed, shuffle_wrong(teacher_logits, some.labels, 0))
    # every wrong class comes to every place: the same row many times, and the means even out
    row = torch.arange(10.0).repeat(4000, 1)
    means = shuffle_wrong(row, torch.full((4000,), 3), 1).mean(0)
    assert means[3] == 3 and (means[torch.arange(10) != 3] - 42 / 9).abs().max() < 0.2


def test_the_weight_of_fitnets_falls_from_four_to_one(some, teacher_logits):
    method = FitNetsKD(some, StoredLogits(teacher_logits))
    seen = []

    class Watched(FitNetsKD):
        def begin_step(self, state):
            super().begin_step(state)
            seen.append(self.loss_weights["kd"])

    fit(Network(8, [16], 0), Watched(some, method.signal), 32, max_steps=4, lr=1e-3, seed=0)
    assert seen == [4.0, 3.25, 2.5, 1.75]
    model = Network(8, [16], 0)
    soft = ImageKD(some, StoredLogits(teacher_logits), temperature=3.0)
    wanted = loss_of(LearnLabels(some), model) + 4.0 * loss_of(soft, model) / 9
    assert float(loss_of(method, model).detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


# --- hints ------------------------------------------------------------------------------------------------------------------------


def test_hints_are_half_the_squared_distance_per_feature(some):
    teacher, student = Network(8, [24, 24], 1), Network(8, [16, 16], 0)
    states = teacher.hidden(some.pixels, 1)
    guided = Guided(student, 24, 0)
    wanted = 0.5 * ((guided.regressor(student.hidden(some.pixels, 1)) - states) ** 2).mean()
    loss = loss_of(ImageKD(some, StoredStates(states)), guided)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_hints_of_an_equal_network_through_the_identity_cost_nothing(some):
    student = Network(8, [16, 16], 0)
    guided = Guided(student, 16, 0)
    with torch.no_grad():
        guided.regressor.weight.copy_(torch.eye(16))
        guided.regressor.bias.zero_()
    loss = loss_of(ImageKD(some, StoredStates(student.hidden(some.pixels, 1))), guided)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not p.grad.any() for p in guided.parameters() if p.grad is not None)


def test_hints_train_the_lower_half_and_leave_the_rest(some):
    student = Network(8, [16] * 6, 0)
    before = {name: p.clone() for name, p in student.named_parameters()}
    states = Network(8, [24, 24], 1).hidden(some.pixels, 1)
    method = ImageKD(some, StoredStates(states))
    fit(Guided(student, 24, 0), method, 32, max_steps=3, lr=1e-2, seed=0)
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"layers.{i}.{part}" for i in range(3) for part in ("weight", "bias")}


def test_training_with_hints_brings_the_states_closer(some):
    student = Network(8, [16, 16], 0)
    states = Network(8, [24, 24], 1).hidden(some.pixels, 1)
    guided, method = Guided(student, 24, 0), ImageKD(some, StoredStates(states))
    before = float(loss_of(method, guided).detach())
    fit(guided, method, 32, max_steps=60, lr=1e-2, seed=0)
    assert float(loss_of(method, guided).detach()) < 0.5 * before


# --- runs -------------------------------------------------------------------------------------------------------------------------

QUICK = {"steps": 40, "teacher_steps": 60, "lr": 1e-2}


def test_every_arm_trains_and_equal_runs_are_equal(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "one"))
    students = ImageStudents()
    cells = {arm: {"arm": arm, **QUICK} for arm in IMAGE_ARMS}
    found = students.run(cells, [0])
    assert all(0.1 < runs[0]["accuracy"] <= 1 for runs in found.values())
    # the regressor of FitNets is no part of the student
    assert len({runs[0]["parameters"] for runs in found.values()}) == 1
    outcomes = {arm: runs[0]["outcomes"] for arm, runs in found.items()}
    assert len(set(outcomes.values())) == len(outcomes), "two arms do the same"
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "two"))
    again = students.run({arm: cells[arm] for arm in ("kd", "fitnets")}, [0])
    assert {arm: runs[0]["outcomes"] for arm, runs in again.items()} == {
        arm: outcomes[arm] for arm in ("kd", "fitnets")
    }


def test_a_student_has_the_teacher_of_its_seed_and_hard_labels_have_none(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    students = ImageStudents()
    run = students.parameters(arm="large", seed=3, task="crowded", **QUICK)
    [(experiment, needed)] = students.before([run])
    assert type(experiment) is ImageTeachers
    assert needed == [{"task": "crowded", "size": "large", "seed": 3, "steps": 60}]
    assert students.before([students.parameters(arm="hard", seed=3, **QUICK)]) == []


def test_a_stored_teacher_answers_as_it_did_when_it_was_scored(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    [metrics] = ImageTeachers().run({"t": {"size": "small", "steps": 60}}, [0])["t"]
    teacher = ImageTeachers().load(size="small", steps=60, seed=0)
    right = right_answers(teacher, task_images("digits", "test"))
    assert right.double().mean().item() == metrics["accuracy"]
    assert not any(p.requires_grad for p in teacher.parameters())
    assert [len(layer.weight) for layer in teacher.layers] == TEACHERS["small"]


def test_a_validation_score_leaves_the_test_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    read = []
    from kd_notes.experiments import images

    def watched(task, split):
        read.append(split)
        return task_images(task, split)

    monkeypatch.setattr(images, "task_images", watched)
    run = ImageStudents().parameters(arm="hard", score_on="validation", **QUICK)
    metrics = ImageStudents().train(run, tmp_path)
    assert "outcomes" not in metrics and set(read) == {"pool", "validation"}


@pytest.mark.parametrize("rows", [0, 1001])
def test_more_pictures_than_there_are_is_an_error_before_any_training(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="The pool of digits has 1000"):
        ImageStudents().run({"kd": {"arm": "kd", "rows": rows, **QUICK}}, [0])
    assert not list(tmp_path.rglob("metrics.json"))


def test_dark_knowledge_helps_and_its_control_does_not(tmp_path, monkeypatch):
    "The finding of the page in small: forty digits, three seeds, one rate."
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    cells = {arm: {"arm": arm, "lr": 1e-2, "steps": 200} for arm in ("hard", "kd", "shuffled")}
    found = ImageStudents().run(cells, [0, 1, 2])
    mean = {arm: sum(m["accuracy"] for m in runs) / 3 for arm, runs in found.items()}
    assert mean["kd"] > mean["hard"] + 0.05 and mean["shuffled"] < mean["kd"] - 0.05
