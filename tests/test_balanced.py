"""BalDistill: quotas, the student's own difficulty, stages that survive a kill, what is refused."""

import math
import os
import signal
from collections import Counter
from contextlib import suppress
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_notes.core import append_jsonl, read_jsonl, rng, UserError
from kd_notes.data.answers import unpack_bits
from kd_notes.data.domains import (
    answer_of,
    clinc_files,
    clinc_tail,
    domain_questions,
    DOMAINS,
    grades,
    noisy_teacher,
    tail_sizes,
)
from kd_notes.experiments.balanced import BalancedBase, BalancedStudents
from kd_notes.experiments.balanced_intents import ClincBank, IntentHead
from kd_notes.methods.balanced import (
    Balanced,
    fresh_students,
    ifd,
    macro_micro,
    own_answer_ifd,
    repeat_to_balance,
    stage_quotas,
    whole_shares,
)
from kd_notes.methods.balanced_stages import balanced_stages, few_shot_question, read_question
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.training.loop import train
from kd_notes.training.method import SFT
from kd_notes.training.state import TrainConfig

SIZES = {"a": 600, "b": 300, "c": 100}


# --- quotas -----------------------------------------------------------------------------------------------------------------------

sizes_of = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 400), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    sizes_of,
    st.integers(1, 6),
    st.integers(0, 300),
    st.sampled_from(["adaptive", "naive", "natural"]),
    st.sampled_from([0, 1]),
    st.sampled_from(["expected", "drawn"]),
)
def test_the_parts_of_all_stages_and_domains_sum_to_the_budget(sizes, k, more, policy, first, draw):
    budget = k + more
    plan = Balanced(budget, k, policy=policy, first=first, natural=draw)
    quotas = stage_quotas(sizes, plan)
    totals = [sum(quota.values()) for quota in quotas]
    assert sum(totals) == budget and max(totals) - min(totals) <= 1
    assert all(quota.keys() == sizes.keys() for quota in quotas)
    assert min(min(quota.values()) for quota in quotas) >= 0


@pytest.mark.parametrize("first, last", [(1, 1.0), (0, 0.8)])
def test_the_adaptive_parts_follow_the_equation(first, last):
    budget, k = 45_000, 5
    quotas = stage_quotas(SIZES, Balanced(budget, k, first=first))
    for stage, quota in enumerate(quotas):
        i = stage + first
        for name, size in SIZES.items():
            wanted = size / 1000 * budget / k * (k - i) / k + budget / k / 3 * i / k
            assert quota[name] == pytest.approx(wanted, abs=1e-6)
    shares = {name: size / 1000 for name, size in SIZES.items()}
    part = (quotas[-1]["c"] / 9000 - shares["c"]) / (1 / 3 - shares["c"])
    assert part == pytest.approx(last)


@settings(max_examples=30, deadline=None)
@given(sizes_of, st.integers(1, 6), st.integers(0, 200))
def test_the_parts_stay_within_two_calls_of_the_equation(sizes, k, more):
    budget = k + more
    quotas = stage_quotas(sizes, Balanced(budget, k))
    whole = sum(sizes.values())
    for stage, quota in enumerate(quotas, 1):
        total = sum(quota.values())
        for name, size in sizes.items():
            wanted = Fraction(size * total * (k - stage), whole * k)
            wanted += Fraction(total * stage, len(sizes) * k)
            assert abs(quota[name] - wanted) < 2


def test_one_stage_is_naive_from_1_and_natural_from_0():
    def one(**options):
        return stage_quotas(SIZES, Balanced(37, 1, **options))

    assert one() == one(policy="naive")
    assert one(first=0) == one(policy="natural") == [{"a": 22, "b": 11, "c": 4}]


def test_the_first_stage_of_the_code_is_a_random_draw():
    plan = Balanced(150, 5, first=0, natural="drawn", seed=3)
    everything = [name for name, size in SIZES.items() for _ in range(size)]
    drawn = Counter(rng("balanced draw", 3, 0).sample(everything, 30))
    assert stage_quotas(SIZES, plan)[0] == {name: drawn[name] for name in SIZES}
    assert stage_quotas(SIZES, plan)[0] != stage_quotas(SIZES, Balanced(150, 5, first=0))[0]


@pytest.mark.parametrize("budget", [3, 20, 101])
def test_equal_domains_make_the_policies_equal_and_one_domain_takes_all(budget):
    same = dict.fromkeys("abc", 9)
    naive = stage_quotas(same, Balanced(budget, 3, policy="naive"))
    assert stage_quotas(same, Balanced(budget, 3)) == naive
    for policy in ("adaptive", "naive"):
        quotas = stage_quotas({"a": 5}, Balanced(budget, 3, policy=policy))
        assert sum(quota["a"] for quota in quotas) == budget


def test_ends_of_the_adaptive_rule():
    quotas = stage_quotas(SIZES, Balanced(300, 3, first=0))
    assert quotas[0] == {"a": 60, "b": 30, "c": 10}
    quotas = stage_quotas(SIZES, Balanced(270, 3))
    assert quotas[-1] == {"a": 30, "b": 30, "c": 30}


def test_units_go_where_most_is_owed():
    assert whole_shares({"a": Fraction(5, 2), "b": Fraction(3, 2)}, 4) == {"a": 3, "b": 1}
    assert whole_shares({"a": Fraction(-1, 2), "b": Fraction(7, 2)}, 3) == {"a": 0, "b": 3}


def test_rounding_does_not_favour_the_first_domain_in_every_stage():
    quotas = stage_quotas(dict.fromkeys("abc", 4), Balanced(40, 10, policy="naive"))
    sums = Counter()
    for quota in quotas:
        sums.update(quota)
    assert max(sums.values()) - min(sums.values()) <= 1


# --- difficulty -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_mini_tokenizer()


def nll(model, prompt: list[int], answer: list[int]) -> float:
    "Return the sum of -log p over the answer's tokens, one forward pass, no padding."
    logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return -sum(float(logits[place, token]) for place, token in zip(places, answer))


@torch.no_grad()
def test_difficulty_is_the_ratio_of_two_perplexities_of_the_students_answer(tokenizer):
    model = mini_model("causal", "xxs", len(tokenizer), 3).eval()
    prompts = ["goat?", "How heavy is the owl, and why?", "42"]
    found = own_answer_ifd(model, tokenizer, prompts, max_new_tokens=6, batch_size=2)
    for prompt, value in zip(prompts, found):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        answer = []
        while len(answer) < 6:
            token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
        given = math.exp(nll(model, ids, answer) / len(answer))
        alone = math.exp(nll(model, [tokenizer.bos_token_id], answer) / len(answer))
        assert value == pytest.approx(given / alone, rel=1e-4)


def test_difficulty_is_one_for_a_model_that_ignores_its_prompt(tokenizer):
    model = mini_model("causal", "xxs", len(tokenizer), 0).train()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(tokenizer), bias=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0].clone()
    found = own_answer_ifd(model, tokenizer, ["goat?", "Is the owl heavy?"], max_new_tokens=5)
    assert found == pytest.approx([1.0, 1.0], abs=1e-4) and model.training


def test_an_empty_answer_counts_as_one(tokenizer):
    assert ifd(0.0, 0.0, 0) == 1.0 and ifd(5.0, 3.0, 2) == pytest.approx(math.e)
    model = mini_model("causal", "xxs", len(tokenizer), 0)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(tokenizer))
    with torch.no_grad():  # it ends every text at once
        model.lm_head.bias[tokenizer.eos_token_id] = 100.0
    assert own_answer_ifd(model, tokenizer, ["goat?"], max_new_tokens=5) == [1.0]


def test_a_student_that_was_changed_by_a_stage_is_refused(tokenizer):
    rows = [{"id": "r", "prompt": "goat?", "completion": "4"}]
    cfg = TrainConfig(max_steps=1, batch_size=1, lr=1e-2, device="cpu", lora={"r": 2})

    def fit(model, taught, stage):
        return train(model, SFT(tokenizer), taught, cfg).model

    def load():
        return mini_model("causal", "xxs", len(tokenizer), 0)

    starts = []

    def hard(model, rows):
        starts.append(sorted(name for name, _ in model.named_parameters() if "lora" in name))
        return [1.0] * len(rows)

    student = fresh_students(load, fit, hard)
    for stage in range(3):
        student(rows, stage)(rows)
    assert starts[0] and starts[0] == starts[1] == starts[2]
    base = load()
    student = fresh_students(lambda: base, fit, hard)
    student(rows, 0)
    with pytest.raises(UserError, match="stage 2.*a stage has changed it"):
        student(rows, 1)


def test_macro_micro_and_repetition():
    right = {"a": 0.9, "b": 0.3}
    assert macro_micro(right, {"a": 3, "b": 1}) == pytest.approx((0.6, 0.75))
    rows = [{"id": f"{d}{i}", "domain": d} for d, n in {"a": 5, "b": 2}.items() for i in range(n)]
    made = repeat_to_balance(rows)
    assert Counter(row["domain"] for row in made) == {"a": 5, "b": 5}
    assert len({row["id"] for row in made}) == 10
    assert Counter(row["id"].split("+")[0] for row in made if row["domain"] == "b") == {
        "b0": 3,
        "b1": 2,
    }


# --- stages -----------------------------------------------------------------------------------------------------------------------

POOL = [
    {"id": f"{k}-{i}", "prompt": f"{i} + {k}", "completion": f"{i + k}", "domain": f"plus {k}"}
    for k, size in {1: 30, 5: 8, 9: 2}.items()
    for i in range(size)
]


def teacher(prompts: list[str]) -> list[str]:
    "Add; err at sums that end in 3; write a question if asked."
    replies = []
    for prompt in prompts:
        if prompt.endswith("Question:"):
            number = rng(prompt).randrange(100, 100_000)
            replies.append(f" {number} + 9\nAnswer: The answer is {number + 9}")
        else:
            value = sum(map(int, prompt.split("+")))
            replies.append(f"The answer is {value + (value % 10 == 3)}")
    return replies


def student(taught: list[dict], stage: int):
    return lambda rows: [int(row["prompt"].split("+")[0]) for row in rows]


def test_stages_choose_the_hardest_rows_and_count_every_call():
    asked = []

    def write(prompts):
        asked.extend(prompts)
        return teacher(prompts)

    plan = Balanced(24, 3)
    rows, reports = balanced_stages(POOL, write, plan, student)
    assert len(asked) == 24 == sum(report["calls"] for report in reports)
    outcomes = ("kept", "written", "dropped", "unreadable", "repeated")
    assert all(report["calls"] == sum(report[name] for name in outcomes) for report in reports)
    first = reports[0]["quota"]
    hardest = [f"{29 - i} + 1" for i in range(first["plus 1"])]
    assert [prompt for prompt in asked if prompt.endswith("+ 1")][: len(hardest)] == hardest
    # The two questions of "plus 9" are used up; the others are the teacher's.
    tail = [row for row in rows if row["domain"] == "plus 9"]
    quota = sum(report["quota"]["plus 9"] for report in reports)
    assert Counter(row["origin"] for row in tail) == {"pool": 2, "written": quota - 2}
    dropped = sum(report["dropped"] for report in reports)
    assert len(rows) == 24 - dropped and dropped > 0
    for row in rows:
        if row["origin"] == "pool":
            assert row["completion"] == f"The answer is {sum(map(int, row['prompt'].split('+')))}"
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)


def test_the_student_of_a_stage_has_read_the_rows_before_it():
    seen = []

    def watching(taught, stage):
        seen.append((stage, len(taught)))
        return student(taught, stage)

    rows, reports = balanced_stages(POOL, teacher, Balanced(24, 3), watching)
    kept = [report["kept"] + report["written"] for report in reports]
    assert seen == [(0, 0), (1, kept[0]), (2, kept[0] + kept[1])]


def test_without_the_filter_wrong_answers_stay():
    plan = Balanced(24, 3, label_filter=False)
    rows, reports = balanced_stages(POOL, teacher, plan, student)
    assert len(rows) == 24
    assert any(
        row["completion"] != f"The answer is {sum(map(int, row['prompt'].split('+')))}"
        for row in rows
    )


def test_without_domains_the_hardest_of_all_are_taken():
    plan = Balanced(10, 2, policy="none", label_filter=False)
    rows, _ = balanced_stages(POOL, teacher, plan, student)
    assert sorted(int(row["prompt"].split()[0]) for row in rows) == list(range(20, 30))
    with pytest.raises(UserError, match="only 40 rows"):
        balanced_stages(POOL, teacher, Balanced(41, 2, policy="none"), student)


def test_random_choice_needs_no_student_and_follows_the_seed():
    first, again, other = (
        balanced_stages(POOL, teacher, Balanced(9, 3, select="random", seed=seed))[0]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    with pytest.raises(UserError, match="needs a student"):
        balanced_stages(POOL, teacher, Balanced(9, 3))


def test_replies_that_are_no_question_or_known_ones_buy_nothing():
    def write(prompts):
        return [
            reply if not prompt.endswith("Question:") else next(bad)
            for prompt, reply in zip(prompts, teacher(prompts))
        ]

    bad = iter(["no idea", " 0 + 9\nAnswer: 9", " 50 + 9\nAnswer: 59"] + ["?"] * 9)
    plan = Balanced(15, 1, policy="naive", label_filter=False)
    rows, (report,) = balanced_stages(POOL, write, plan, student)
    assert report["quota"]["plus 9"] == 5
    assert (report["unreadable"], report["repeated"], report["written"]) == (1, 1, 1)
    assert report["calls"] == 15 and len(rows) == 13


def test_a_row_whose_id_looks_like_a_written_one_keeps_its_reply(tmp_path):
    rows = [{"id": "a/0", "prompt": "1 + 1", "completion": "2", "domain": "a"}]

    def write(prompts):
        return ["2" if p == "1 + 1" else " 7 + 9\nAnswer: 16" for p in prompts]

    plan = Balanced(2, 1, select="random")
    for _ in range(2):  # the second time from the file
        made, _ = balanced_stages(rows, write, plan, folder=tmp_path)
        assert [row["completion"] for row in made] == ["2", "16"]


def test_nothing_is_written_if_the_teacher_must_not():
    plan = Balanced(15, 1, policy="naive", fill="nothing", label_filter=False)
    rows, (report,) = balanced_stages(POOL, teacher, plan, student)
    assert len(rows) == report["calls"] == 12


def test_the_default_prompt_and_its_reply():
    shown = [{"prompt": "1 + 9", "completion": "10"}]
    asked = few_shot_question("plus 9", shown, "1.1")
    assert asked.endswith("Question: 1 + 9\nAnswer: 10\n\nQuestion:")
    reply = " 2 + 9\nAnswer: it is 11\n\nQuestion: 3 + 9\nAnswer: 12"
    assert read_question(reply, "plus 9") == ("2 + 9", "it is 11")
    for text in ("", "2 + 9", " \nAnswer: 11", " 2 + 9\nAnswer: \n\nQuestion: 4"):
        assert read_question(text, "plus 9") is None


@pytest.mark.parametrize(
    "rows, options, problem",
    [
        ([{"prompt": "1 + 1", "completion": "2"}], {}, "row 0: the field 'domain' is missing"),
        ([POOL[0] | {"domain": " "}], {}, "the field 'domain' is missing"),
        ([], {}, "there are no rows"),
        (POOL, {"domains": ["plus 1", "plus 5", "plus 7", "plus 9"]}, "'plus 7' has no rows"),
        (POOL, {"domains": ["plus 1"]}, "the rows have the domain 'plus 5'"),
        ([POOL[0], POOL[0]], {}, "an id occurs twice"),
        ([POOL[0] | {"prompt": [{"role": "user", "content": "x"}]}], {}, "a chat, not text"),
    ],
)
def test_bad_rows_are_named(rows, options, problem):
    with pytest.raises(UserError, match=problem):
        balanced_stages(rows, teacher, Balanced(6, 2), student, **options)


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"budget": 0}, "setting budget: 0 is not a whole number from 5"),
        ({"budget": 4}, "at least one call"),
        ({"budget": 9, "policy": "fair"}, "policy: 'fair' is not known"),
        ({"budget": 9, "first": 2}, "first: 2 is not known"),
        ({"budget": 9, "stages": 0}, "setting stages"),
    ],
)
def test_bad_settings_are_named(values, problem):
    with pytest.raises(UserError, match=problem):
        Balanced(**values)


@pytest.mark.parametrize("replies", [[], ["a"] * 99, [None] * 16])
def test_a_teacher_that_returns_something_else_is_named(replies):
    with pytest.raises(UserError, match="write: the teacher returned"):
        balanced_stages(POOL, lambda prompts: replies, Balanced(9, 3), student)


@pytest.mark.parametrize("numbers", [[1.0], [math.nan] * 40])
def test_a_student_without_numbers_is_named(numbers):
    with pytest.raises(UserError, match="student, stage 1"):
        balanced_stages(POOL, teacher, Balanced(9, 3), lambda *_: lambda rows: numbers)


# --- kills ------------------------------------------------------------------------------------------------------------------------


def run_and_die(folder: str, dies: str) -> None:
    "Run the stages; die at this event."
    calls = folder + "/calls.jsonl"

    def event(name):
        if name == dies:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(prompts):
        done = len(read_jsonl(calls)) if os.path.exists(calls) else 0
        event(f"call {done}")
        append_jsonl(calls, [{"prompt": prompt} for prompt in prompts])
        return teacher(prompts)

    def watching(taught, stage):
        append_jsonl(folder + "/trained.jsonl", [{"stage": stage}])
        event(f"stage {stage}")
        return student(taught, stage)

    rows, _ = balanced_stages(POOL, write, Balanced(24, 3, batch=4), watching, folder=folder)
    append_jsonl(folder + "/rows.jsonl", rows)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_inside_or_between_stages_loses_no_reply(tmp_path):
    for dies in ("call 12", "stage 2", ""):  # inside the second stage, and before the third
        pid = os.fork()
        if not pid:
            with suppress(BaseException):
                run_and_die(str(tmp_path), dies)
                os._exit(0)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == (-signal.SIGKILL if dies else 0)
    expected, _ = balanced_stages(POOL, teacher, Balanced(24, 3, batch=4), student)
    assert read_jsonl(tmp_path / "rows.jsonl") == expected
    assert len(read_jsonl(tmp_path / "calls.jsonl")) == 24  # no reply was asked for twice
    # Stages whose choice was stored are not trained again.
    assert [row["stage"] for row in read_jsonl(tmp_path / "trained.jsonl")] == [0, 1, 2, 2]


def test_a_folder_of_another_teacher_or_student_is_refused(tmp_path):
    plan, options = Balanced(9, 3), {"folder": tmp_path}
    mine = {"identity": {"teacher": "first", "student": "xs"}}
    first = balanced_stages(POOL, teacher, plan, student, **mine, **options)
    assert balanced_stages(POOL, None, plan, student, **mine, **options) == first
    for other in (
        {"teacher": "second", "student": "xs"},
        {"teacher": "first", "student": "s"},
        None,
    ):
        with pytest.raises(UserError, match="belongs to another job"):
            balanced_stages(POOL, teacher, plan, student, identity=other, **options)


def test_a_folder_of_other_rows_or_prompts_is_refused(tmp_path):
    plan = Balanced(9, 3)
    first = balanced_stages(POOL, teacher, plan, student, folder=tmp_path)
    assert balanced_stages(POOL, None, Balanced(9, 3, batch=2), student, folder=tmp_path) == first
    with pytest.raises(UserError, match="belongs to another job"):
        balanced_stages(POOL[1:], teacher, plan, student, folder=tmp_path)
    with pytest.raises(UserError, match="answers another prompt"):
        balanced_stages(
            POOL, teacher, plan, student, folder=tmp_path, ask=lambda row: "Add " + row["prompt"]
        )


# --- questions, intents and the experiment ----------------------------------------------------------------------------------------


def test_the_tail_falls_by_one_factor_and_questions_differ():
    sizes = tail_sizes(81, 3, ["a", "b", "c", "d"])
    assert sizes == {"a": 81, "b": 27, "c": 9, "d": 3}
    rows = domain_questions({"tools": 60, "cities": 3}, seed=1)
    assert Counter(row["domain"] for row in rows) == {"tools": 60, "cities": 3}
    assert len({row["prompt"] for row in rows}) == 63
    first = rows[0]["prompt"]
    assert first not in {r["prompt"] for r in domain_questions({"tools": 60}, 1, {first})}


def test_a_teacher_without_noise_is_right_and_writes_questions_of_the_domain():
    rows = domain_questions(dict.fromkeys(DOMAINS, 5), seed=2)
    teacher = noisy_teacher(0.0)
    replies = teacher([row["prompt"] for row in rows])
    assert [answer_of(text) for text in replies] == [row["completion"] for row in rows]
    asked = few_shot_question("cities", [r for r in rows if r["domain"] == "cities"], "1")
    prompt, completion = read_question(teacher([asked])[0], "cities")
    assert prompt.startswith("Coldest city: ")
    table = grades("cities", DOMAINS["cities"][1])
    things = [thing for thing in table if thing in prompt]
    assert answer_of(completion) == max(things, key=table.get)
    assert teacher(["What time is it?"]) == ["I do not know."]
    wrong = noisy_teacher(0.5)([row["prompt"] for row in rows])
    assert wrong != replies and wrong == noisy_teacher(0.5)([row["prompt"] for row in rows])


def test_intents_are_read_from_the_named_folder_only(tmp_path, monkeypatch):
    monkeypatch.delenv("KD_NOTES_DATA", raising=False)
    with pytest.raises(UserError, match="KD_NOTES_DATA"):
        clinc_files()
    for part, number in (("train", 100), ("val", 2)):
        rows = [
            {"text": f"{part} {i} of {name}", "label": name}
            for name in ("ask_time", "play_song", "set_alarm")
            for i in range(number if name != "set_alarm" else 5)
        ]
        append_jsonl(tmp_path / f"clinc150_imbalanced_{part}.jsonl", rows)
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    parts = clinc_tail(intents=2, largest=50, smallest=4)
    assert sorted(Counter(row["domain"] for row in parts["pool"]).values()) == [4, 50]
    assert Counter(row["domain"] for row in parts["rest"]) == {"ask_time": 50, "play_song": 50}
    assert not {r["prompt"] for r in parts["pool"]} & {r["prompt"] for r in parts["rest"]}
    assert len(parts["test"]) == 4


def test_a_head_reads_its_row_of_the_features():
    features = torch.randn(5, 4)
    head = IntentHead(features, 3, 8, seed=1).eval()
    assert torch.equal(
        head(torch.tensor([[3]])), IntentHead(features, 3, 8, 1).eval()(torch.tensor([[3, 0]]))
    )


TINY = {
    "budget": 16,
    "stages": 2,
    "steps": 4,
    "largest": 20,
    "smallest": 1,
    "held": 2,
    "base": {"steps": 2, "size": "xxs"},
}


def test_every_arm_gets_the_same_calls_and_learns_from_them(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    students = BalancedStudents()
    for arm in ("start", "duplicate", "naive", "adaptive_code", "naive_nothing"):
        made = students.train(students.parameters(arm=arm, **TINY), tmp_path)
        assert len(unpack_bits(made["right"], 16)) == 16
        if arm == "start":
            assert sum(unpack_bits(made["teacher_right"], 16)) > 10
            continue
        assert sum(made["rows"]) == made["kept"] + made["written"]
        assert made["calls"] == 16 or arm == "naive_nothing" and 8 <= made["calls"] < 16
        if arm in ("random", "duplicate", "active", "naive_nothing"):
            assert made["written"] == 0
        if arm == "naive":
            assert made["written"] > 0


def test_a_start_is_read_back_as_it_was_trained_and_damage_is_one_clear_error(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    bases = BalancedBase()
    run = bases.parameters(steps=1, size="xxs")
    keep, trained = BalancedBase.keep, []

    def remembered(self, model, folder):
        trained.append(model)
        keep(self, model, folder)

    monkeypatch.setattr(BalancedBase, "keep", remembered)
    read = bases.model(run)
    assert all(map(torch.equal, read.parameters(), trained[0].parameters()))
    assert bases.model(run) is not read and len(trained) == 1
    (bases.folder(run) / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="model.safetensors: the model cannot be read"):
        bases.model(run)


def test_starts_and_the_bank_of_sentences_are_made_before_the_students():
    students = BalancedStudents()
    asked = {"questions": {"base": {"steps": 3}}, "clinc": {"largest": 30, "smallest": 2}}
    runs = [students.parameters(arm="active", data=d, **more) for d, more in asked.items()]
    (base, starts), (bank, banks) = students.before(runs)
    assert isinstance(base, BalancedBase) and starts == [base.parameters(steps=3)]
    assert isinstance(bank, ClincBank) and banks == [bank.parameters(largest=30, smallest=2)]
    assert students.before([]) == []


def test_settings_of_the_experiment_are_checked():
    students = BalancedStudents()
    with pytest.raises(UserError, match="there is no arm 'fair'"):
        students.parameters(arm="fair")
    with pytest.raises(UserError, match="'letters'"):
        students.parameters(arm="random", data="letters")
