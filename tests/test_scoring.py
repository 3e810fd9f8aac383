"""Assessment scoring: kappa, folds, the loss, what is refused, the experiment on a few answers."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_notes.core import UserError
from kd_notes.data.scoring import answer_sets, check_scores, quadratic_kappa, science_answers
from kd_notes.experiments import scoring
from kd_notes.experiments.scoring import (
    LABELS,
    read_answers,
    Scoring,
    SCORING_ARMS,
    ScoringFeatures,
    ScoringTeachers,
    soft_labels,
)
from kd_notes.methods.scoring import (
    EncoderScorer,
    in_fold,
    LayerScorer,
    out_of_fold,
    PAD,
    person_folds,
    score_probabilities,
    ScoringKD,
    Words,
    WordScorer,
)
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.runner.grid import ROW_LIMIT
from kd_notes.training.loop import train
from kd_notes.training.state import TrainConfig


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return science_answers(30, seed=9, noise=0.1)


def free_logits(start: torch.Tensor) -> torch.nn.Module:
    "A model with one row of logits for each first id."

    class Free(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(start.clone())

        def forward(self, input_ids):
            return self.logits[input_ids[:, 0]]

    return Free()


# --- kappa ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "human, model, labels, kappa",
    [
        ([0, 1, 2, 2], [0, 2, 2, 1], 3, 7 / 11),  # seen 2, shuffled 22 / 4
        ([0, 1], [1, 0], 2, -1.0),  # seen 2, shuffled 2 / 2
        ([0, 0, 1, 1], [0, 1, 0, 1], 2, 0.0),
        ([0, 1, 2, 3], [3, 1, 2, 0], 4, -0.8),  # seen 18, shuffled 40 / 4
        ([1, 1], [1, 1], 3, 1.0),
        ([0, 1, 2], [1, 1, 1], 3, 0.0),
    ],
)
def test_kappa_of_tables_counted_by_hand(human, model, labels, kappa):
    assert quadratic_kappa(human, model, labels) == pytest.approx(kappa, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12))
def test_kappa_is_one_minus_the_cost_over_that_of_all_pairs(pairs):
    human, model = zip(*pairs)
    shuffled = sum((a - b) ** 2 for a, b in product(human, model)) / len(pairs)
    cost = sum((a - b) ** 2 for a, b in pairs)
    expected = 1.0 if shuffled == 0 else 1 - cost / shuffled
    assert quadratic_kappa(human, model, 4) == pytest.approx(expected, abs=1e-9)


def test_kappa_agrees_with_scikit_learn():
    from sklearn.metrics import cohen_kappa_score

    human, model = np.random.default_rng(0).integers(0, 3, (2, 200))
    theirs = cohen_kappa_score(human, model, weights="quadratic")
    assert quadratic_kappa(human, model) == pytest.approx(theirs, abs=1e-12)


# --- answers ----------------------------------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_answers_and_noise_moves_scores_by_one():
    true, noisy = (science_answers(100, 4, noise=noise) for noise in (0.0, 0.3))
    assert true == science_answers(100, 4)
    assert [r["answer"] for r in true[:4]] == [r["answer"] for r in science_answers(1, 4)]
    assert {r["score"] for r in true} == {0, 1, 2} and len({r["id"] for r in true}) == 400
    assert [r["answer"] for r in noisy] == [r["answer"] for r in true]
    moved = [abs(a["score"] - b["score"]) for a, b in zip(noisy, true)]
    assert set(moved) == {0, 1} and 0.2 < np.mean(moved) < 0.4


def test_tests_hold_true_scores_and_other_people():
    sets = answer_sets("science", people=12)
    assert sets.tests["new people"] == science_answers(250, 3)
    people = [
        {r["person"] for r in part} for part in (sets.train, sets.validation, *sets.tests.values())
    ]
    assert not people[0] & people[1] and not people[2] & (people[0] | people[1])


@pytest.mark.parametrize("score", [3, -1, 1.0, True, "1", None])
def test_a_score_outside_the_rubric_is_named(score):
    with pytest.raises(UserError, match="outside the rubric") as error:
        check_scores([{"id": "a.1", "score": 1}, {"id": "a.2", "score": score}])
    assert "a.2" in str(error.value)


def beetle_row(number: int, split: str, **more) -> dict:
    row = {"id": f"Q{number % 3}.sbj{number}-l1.qa{number}", "question": "Why?", "split": split}
    labels = ("correct", "contradictory", "partially_correct_incomplete")
    row |= {
        "answer": "the path is open",
        "references": ["It is open."],
        "label": labels[number % 3],
    }
    return row | more


def write_beetle(folder, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "beetle.jsonl").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "rows, said",
    [
        ([beetle_row(1, "train", label="excellent")], "beetle.jsonl:1"),
        ([beetle_row(1, "train"), beetle_row(2, "train", references=[])], "beetle.jsonl:2"),
        ([beetle_row(1, "train", id="without-a-person")], "no row of Beetle"),
        ([beetle_row(1, "train")], "there are no rows of"),
    ],
)
def test_a_bad_file_of_beetle_is_one_clear_error(tmp_path, monkeypatch, rows, said):
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    write_beetle(tmp_path, rows)
    with pytest.raises(UserError, match=said):
        answer_sets("beetle")


def test_beetle_keeps_its_tests_and_divides_the_rest_by_person(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    parts = {"train": 40, "unseen-answers": 5, "unseen-questions": 7}
    made = [beetle_row(i, split) for split, n in parts.items() for i in range(n)]
    write_beetle(tmp_path, made)
    sets = answer_sets("beetle")
    assert {name: len(rows) for name, rows in sets.tests.items()} == {
        "unseen-answers": 5,
        "unseen-questions": 7,
    }
    assert len(sets.train) + len(sets.validation) == 40 and len(sets.validation) == 12
    assert not {r["person"] for r in sets.train} & {r["person"] for r in sets.validation}
    assert [r["score"] for r in sets.tests["unseen-answers"]] == [2, 0, 1, 2, 0]


def test_beetle_without_a_folder_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("KD_NOTES_DATA", raising=False)
    with pytest.raises(UserError, match="KD_NOTES_DATA"):
        answer_sets("beetle")


# --- folds ------------------------------------------------------------------------------------------------------------------------


def test_no_person_is_in_two_folds_and_every_teacher_misses_its_fold(rows):
    folds = person_folds(rows, 4)
    place = {}
    assert set(folds) == {0, 1, 2, 3}
    assert all(place.setdefault(r["person"], f) == f for r, f in zip(rows, folds))
    read: list[set] = []

    def teach(known):
        ids = {r["id"] for r in known}
        read.append(ids)

        def predict(asked):
            assert not ids & {r["id"] for r in asked}
            return np.tile([0.2, 0.3, 0.5], (len(asked), 1)) + 0 * len(read)

        return predict

    labelled = out_of_fold(rows, teach, k=4)
    assert [r["id"] for r in labelled] == [r["id"] for r in rows]
    assert all(sum(r["id"] in ids for ids in read) == 3 for r in rows)
    assert all(r["soft"] == [0.2, 0.3, 0.5] for r in labelled) and "soft" not in rows[0]


def test_each_label_lands_at_its_own_row(rows):
    def teach(known):
        return lambda asked: np.array([[int(r["person"][2:]), len(r["answer"]), 0] for r in asked])

    labelled = out_of_fold(rows, teach, k=3)
    assert all(r["soft"][:2] == [int(r["person"][2:]), len(r["answer"])] for r in labelled)


def test_in_fold_labels_repeat_the_grader_and_out_of_fold_labels_do_not():
    true, noisy = (science_answers(60, 5, noise=noise) for noise in (0.0, 0.25))
    words = Words(noisy)
    known = words.rows(noisy)

    def teach(rows):
        torch.manual_seed(0)
        model = WordScorer(len(words), LABELS, 64, 128)
        cfg = TrainConfig(max_steps=250, batch_size=32, lr=3e-3, device="cpu")
        train(model, ScoringKD(weight=0.0), rows, cfg)
        return lambda asked: score_probabilities(model, asked)

    scores = np.array([r["score"] for r in noisy])
    sides = {"in": in_fold(known, teach), "out": out_of_fold(known, teach, k=3)}
    agree = {
        side: np.mean(np.argmax([r["soft"] for r in labelled], 1) == scores)
        for side, labelled in sides.items()
    }
    assert agree["in"] > 0.9 > agree["out"] + 0.1
    wrong = scores != [r["score"] for r in true]  # the grader was
    follow = {
        side: (np.argmax([r["soft"] for r in rows], 1) == scores)[wrong]
        for side, rows in sides.items()
    }
    assert follow["in"].mean() > 0.8 > 0.5 > follow["out"].mean()


@pytest.mark.parametrize("k, said", [(1, "cannot be dealt"), (31, "cannot be dealt")])
def test_too_few_people_or_folds_are_refused(rows, k, said):
    with pytest.raises(UserError, match=said):
        person_folds(rows, k)


def test_a_class_that_is_missing_in_a_fold_is_one_clear_error(rows):
    rare = [r | {"score": min(r["score"], 1)} for r in rows]
    rare[3] |= {"score": 2}
    with pytest.raises(UserError, match="the score 2 is missing in fold"):
        out_of_fold(rare, lambda known: pytest.fail("a teacher was trained"), k=3)


# --- loss -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_gradient_is_the_distance_to_the_mixture(weight):
    "d L / d logits = (1 + lambda) (f - (y + lambda p) / (1 + lambda))."
    method = ScoringKD(3, weight)
    model = free_logits(torch.randn(1, 3, generator=torch.Generator().manual_seed(1)))
    soft = torch.tensor([0.1, 0.6, 0.3])
    item = method.encode({"ids": [0], "score": 0, "soft": soft.tolist()})
    sums = method.loss_sums(model, method.collate([item]))
    sum(method.loss_weights[term] * value for term, value in sums.items()).backward()
    f = model.logits.detach().softmax(1)[0]
    mixture = (torch.tensor([1.0, 0, 0]) + weight * soft) / (1 + weight)
    expected = (1 + weight) * (f - mixture)
    assert torch.allclose(model.logits.grad[0], expected, atol=1e-6)


def test_a_teacher_as_sure_as_the_label_only_scales_the_loss():
    method = ScoringKD(3, 4.0)
    model = free_logits(torch.randn(1, 3, generator=torch.Generator().manual_seed(2)))
    batch = method.collate([method.encode({"ids": [0], "score": 1, "soft": [0.0, 1.0, 0.0]})])
    sums = method.loss_sums(model, batch)
    total = sum(method.loss_weights[term] * value for term, value in sums.items())
    assert total.item() == pytest.approx(5 * sums["hard"].item(), rel=1e-6)


@pytest.mark.parametrize("weight, term", [(0.0, "hard"), (1e6, "soft")])
def test_at_the_ends_of_the_weight_one_of_the_two_terms_is_the_loss(weight, term):
    method = ScoringKD(3, weight)
    model = free_logits(torch.randn(1, 3, generator=torch.Generator().manual_seed(3)))
    batch = method.collate([method.encode({"ids": [0], "score": 2, "soft": [0.7, 0.2, 0.1]})])
    sums = method.loss_sums(model, batch)
    total = sum(method.loss_weights[name] * value for name, value in sums.items())
    log_f = model.logits.detach()[0].log_softmax(0)
    alone = {"hard": -log_f[2], "soft": -(torch.tensor([0.7, 0.2, 0.1]) * log_f).sum()}[term]
    assert total.item() / max(weight, 1.0) == pytest.approx(alone.item(), rel=1e-5)


def test_minimum_with_free_logits_is_the_mixture():
    model = free_logits(torch.zeros(1, 3))
    cfg = TrainConfig(max_steps=400, batch_size=1, lr=0.1, schedule="cosine", device="cpu")
    train(model, ScoringKD(3, 3.0), [{"ids": [0], "score": 0, "soft": [0.2, 0.2, 0.6]}], cfg)
    found = model.logits.detach().softmax(1)[0]
    assert torch.allclose(found, torch.tensor([1.6, 0.6, 1.8]) / 4, atol=2e-3)


def test_padding_and_accumulation_do_not_change_the_gradient(rows):
    words = Words(rows)
    known = [r | {"soft": [0.5, 0.25, 0.25]} for r in words.rows(rows[:8])]
    method = ScoringKD()
    items = [method.encode(row) for row in known]
    for made in (WordScorer(len(words), 3), EncoderScorer(len(words), 3, 24, 2, 48)):
        model = made.eval()
        together = method.loss_sums(model, method.collate(items))
        alone = [method.loss_sums(model, method.collate([item])) for item in items]
        for term, value in together.items():
            assert value.item() == pytest.approx(sum(a[term].item() for a in alone), rel=1e-4)


def test_an_empty_answer_and_extreme_logits_stay_finite(rows):
    words = Words(rows)
    row = words.rows([rows[0] | {"answer": ""}])[0]
    assert len(row["ids"]) == 1 and row["ids"][0] != PAD
    method = ScoringKD()
    batch = method.collate([method.encode(row | {"soft": [1.0, 0.0, 0.0]})] * 2)
    model = WordScorer(len(words), 3).eval()
    assert all(torch.isfinite(v) for v in method.loss_sums(model, batch).values())
    wild = free_logits(torch.tensor([[1e4, -1e4, 0.0]] * (row["ids"][0] + 1)))
    sums = method.loss_sums(wild, batch)
    sum(sums.values()).backward()
    assert all(torch.isfinite(v) for v in sums.values()) and wild.logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "soft, said",
    [
        ([0.5, 0.5], "over 2 scores, but the rubric has 3"),
        ([0.2] * 5, "over 5 scores, but the rubric has 3"),
        (None, "no soft label"),
        ([2.0, -1.0, 0.0], "does not hold probabilities"),
        ([3.0, 1.0, 0.5], "does not hold probabilities"),
    ],
)
def test_a_teacher_of_another_label_set_is_refused_before_a_step(soft, said):
    row = {"id": "a.1", "ids": [0], "score": 1, "soft": soft}
    cfg = TrainConfig(max_steps=1, batch_size=1, lr=0.1, device="cpu")
    model = free_logits(torch.zeros(1, 3))
    with pytest.raises(UserError, match=said) as error:
        train(model, ScoringKD(), [row], cfg)
    assert "a.1" in str(error.value) and not model.logits.any()


def test_a_negative_weight_is_refused():
    with pytest.raises(UserError, match="weight"):
        ScoringKD(weight=-1.0)


# --- experiment -------------------------------------------------------------------------------------------------------------------

TINY = {"people": 12, "steps": 6}
TEACHER = {"steps": 6, "members": 1, "folds": 2, "bank": 4}


def test_arms_share_the_network_and_differ_in_their_soft_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    cells = {
        arm: dict(arm=arm, data="science", lr=0.01, teacher=TEACHER, **TINY) for arm in SCORING_ARMS
    }
    found = {arm: runs[0] for arm, runs in Scoring().run(cells, [0]).items()}
    sizes = {arm: m["parameters"] for arm, m in found.items()}
    assert len({n for arm, n in sizes.items() if arm != "tinybert"}) == 1
    assert sizes["tinybert"] > 5 * sizes["kd"]
    assert all(len(m["new people: scores"]) == 1000 for m in found.values())
    assert all(len(json.dumps(m)) < ROW_LIMIT for m in found.values())
    assert found["kd"]["new people: loss"] != found["kd_in_fold"]["new people: loss"]
    run = Scoring().parameters(**cells["kd"], seed=0)
    inside, outside = (soft_labels(run["teacher"], side) for side in ("inside", "outside"))
    assert inside.shape == outside.shape == (48, LABELS) and not np.allclose(inside, outside)
    assert np.allclose(outside.sum(1), 1, atol=1e-4)


def test_both_sets_in_one_call_keep_the_checksums_of_their_own_files(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    parts = {"train": 40, "unseen-answers": 6, "unseen-questions": 6}
    write_beetle(tmp_path, [beetle_row(i, split) for split, n in parts.items() for i in range(n)])
    cells = {data: dict(arm="alone", data=data, lr=0.01, **TINY) for data in ("science", "beetle")}
    Scoring().run(cells, [0])
    for cell in cells.values():
        run = Scoring().parameters(**cell, seed=0)
        assert (Scoring().folder(run) / "metrics.json").is_file()
    assert all(kind.input_settings == ("data",) for kind in (ScoringFeatures, ScoringTeachers))


def test_a_second_call_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    cell = {"alone": dict(arm="alone", data="science", lr=0.01, **TINY)}
    first = Scoring().run(cell, [0])
    monkeypatch.setattr(Scoring, "train", lambda *_: pytest.fail("trained again"))
    assert Scoring().run(cell, [0]) == first


def test_an_arm_without_a_teacher_has_no_teacher_in_its_parameters():
    run = Scoring().parameters(arm="alone", data="science", seed=0, lr=0.01, teacher={"bank": 9})
    assert run["teacher"] == {} and run["weight"] == 0.0
    assert Scoring().parameters(arm="smooth", data="science", seed=0, lr=0.01)["weight"] == 1.0


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"data": "poetry"}, "no answers"),
        ({"data": "beetle", "bank": 3}, "only 'science' has a bank"),
    ],
)
def test_impossible_teachers_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        run = ScoringTeachers().parameters(**settings)
        ScoringTeachers().train(run, None)


# --- a finetuned teacher ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_body():
    "The lower layers of a model that has more, as `lower_layers` gives them."
    tokenizer = load_mini_tokenizer()
    body = mini_model("causal", "s", len(tokenizer), seed=0).eval().model
    assert body.config.num_hidden_layers > 2
    body.layers, body.norm = body.layers[:2], torch.nn.Identity()
    return body, tokenizer


ASKED = [
    {"prompt": "Question: Why is it warm in here?", "answer": "it is hot"},
    {"prompt": "Why?", "answer": "so"},
    {"prompt": "Why?", "answer": "because the sun is up"},
]


def layer_scorer(body, tokenizer, trained: int) -> LayerScorer:
    answers = read_answers(body, tokenizer, ASKED, trained)
    mean, std = answers.features.mean(0), answers.features.std(0) + 1e-4
    torch.manual_seed(0)
    head = WordScorer(9, LABELS, features=(answers.features - mean) / std)
    return LayerScorer(body, answers, head, mean, std)


@pytest.mark.parametrize("trained", [1, 2])
def test_before_it_learns_a_layer_scorer_is_its_head_on_frozen_features(tiny_body, trained):
    body, tokenizer = tiny_body
    scorer = layer_scorer(body, tokenizer, trained).eval()
    ids = torch.tensor([[2, 5, 6], [0, 5, 7], [1, 5, 8]])
    assert torch.allclose(scorer(ids), scorer.head(ids), atol=1e-4)
    for place, row in enumerate(ASKED):  # and the features are those of the whole text
        parts = (f"{row['prompt']}\nStudent answer:", f" {row['answer']}")
        start, said = (tokenizer(part, return_tensors="pt").input_ids for part in parts)
        states = body(torch.cat([start, said], 1)).last_hidden_state[0, start.shape[1] :]
        assert torch.allclose(scorer.last_states([place])[0], states.mean(0), atol=1e-4)


def test_only_a_copy_of_the_upper_layers_learns(tiny_body):
    body, tokenizer = tiny_body
    before = {name: p.clone() for name, p in body.named_parameters()}
    scorer = layer_scorer(body, tokenizer, 1)
    assert len(scorer.body.layers) == 1 and len(body.layers) == 2
    upper = [p.clone() for p in scorer.body.layers.parameters()]
    kept = [x.clone() for x in scorer.answers.said]
    rows = [{"ids": [i, 5, 6], "score": i} for i in range(3)]
    cfg = TrainConfig(max_steps=60, batch_size=3, lr=3e-3, device="cpu")
    train(scorer, ScoringKD(LABELS, 0.0), rows, cfg)
    assert score_probabilities(scorer, rows).argmax(1).tolist() == [0, 1, 2]
    assert all(torch.equal(p, before[name]) for name, p in body.named_parameters())
    assert not any(torch.equal(p, q) for p, q in zip(upper, scorer.body.layers.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, scorer.answers.said))


def test_a_finetuned_teacher_labels_in_and_out_of_fold_and_a_trial_reads_no_test(
    tiny_body, tmp_path, monkeypatch
):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    monkeypatch.setattr(scoring, "lower_layers", lambda layers: tiny_body)
    parts = {"train": 60, "unseen-answers": 5, "unseen-questions": 7}
    write_beetle(tmp_path, [beetle_row(i, split) for split, n in parts.items() for i in range(n)])
    wanted = dict(data="beetle", layers=2, trained=1, members=1, steps=4)
    wanted |= dict(tuning_steps=3, tuning_lr=1e-3)
    run = ScoringTeachers().parameters(**wanted, folds=2)
    found = ScoringTeachers().cached(run)
    inside, outside = (soft_labels(run, side) for side in ("inside", "outside"))
    assert inside.shape == outside.shape == (48, LABELS) and not np.allclose(inside, outside)
    assert len(found["unseen-questions: scores"]) == 7
    trial = ScoringTeachers().cached(ScoringTeachers().parameters(**wanted, folds=0))
    assert trial == {"accuracy_validation": found["accuracy_validation"]}


def test_a_frozen_teacher_has_the_parameters_it_had_and_too_many_trained_layers_are_refused():
    run = ScoringTeachers().parameters(data="beetle", layers=10)
    assert not run.keys() & {"trained", "tuning_steps", "tuning_lr", "precision"}
    with pytest.raises(UserError, match="6 of 10 layers"):
        ScoringTeachers().parameters(data="beetle", layers=10, trained=6)


def test_frozen_states_are_the_features_that_a_finetuned_teacher_starts_from(
    tiny_body, monkeypatch
):
    monkeypatch.setattr(scoring, "lower_layers", lambda layers: tiny_body)
    found, tokens = scoring.frozen_states(ASKED, 2)
    read = read_answers(*tiny_body, ASKED, 1)
    assert np.allclose(found, read.features.numpy(), atol=2e-3)  # float16
    assert tokens == sum(map(len, read.said))
