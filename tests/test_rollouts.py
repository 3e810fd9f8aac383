"""Rollouts as a phase: rows of any shape, ends and layouts of two models, health terms, top-k parts, and faults that others had."""

import math
from types import SimpleNamespace

import pytest
import torch

from kd_notes.core import UserError
from kd_notes.data.examples import Example
from kd_notes.data.rows import TextRow
from kd_notes.losses.divergences import token_divergence
from kd_notes.methods.gkd import GKD, GKDConfig, Part, top_k_logits
from kd_notes.methods.health import (
    ALARMS,
    health_alarms,
    entropy_sum,
    health_sums,
    own_prefixes,
    prefix_health,
    response_health,
)
from kd_notes.methods.minillm import MiniLLM, MiniLLMConfig, set_advantages
from kd_notes.methods.on_policy import OnPolicy, OnPolicyConfig, Term
from kd_notes.methods.prompts import check_templates, encode_prompt, stop_ids
from kd_notes.methods.rollouts import (
    gold_responses,
    Response,
    response_batch,
    RolloutRow,
    Rollouts,
)
from kd_notes.models.mini import load_mini_tokenizer
from kd_notes.training.loop import train
from kd_notes.training.state import TrainConfig

torch.set_num_threads(1)
VOCABULARY = 5


class Ids:
    pad_token_id = eos_token_id = 0


def toy(seed, width=8, ends=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=width,
        n_layer=1,
        n_head=2,
        initializer_range=0.4,
        embd_pdrop=0,
        attn_pdrop=0,
        resid_pdrop=0,
        bos_token_id=0,
        eos_token_id=ends,
    )
    return GPT2LMHeadModel(config)


ROWS = [{"id": f"p{i}", "prompt": [1, 1 + i % 3], "completion": [2, 1, 0]} for i in range(6)]


def config(steps=4, **changes):
    settings = {"batch_size": 4, "lr": 1e-3, "log_every": 1, "device": "cpu"} | changes
    return TrainConfig(max_steps=steps, **settings)


# ---------------------------------------------------------------- rows


CHAT = [{"role": "user", "content": "A dog?"}, {"role": "assistant", "content": "Yes."}]
SHAPES = {
    "completion": {"prompt": "A dog?", "completion": "Yes."},
    "response": {"prompt": "A dog?", "response": "Yes."},
    "instruction": {"instruction": "A dog?", "input": "", "output": "Yes."},
    "label": {"input": "A dog?", "label": "Yes."},
    "example": Example(id="e", task="cqa", input="A dog?", label="Yes."),
    "messages": {"messages": CHAT},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_give_the_same_completion(shape):
    tokenizer = load_mini_tokenizer()
    encoded = encode_prompt(tokenizer, SHAPES[shape], 7)
    assert "A dog?" in tokenizer.decode(encoded["prompt"])
    assert tokenizer.decode(encoded["completion"], skip_special_tokens=True) == "Yes."
    assert encoded["completion"].count(tokenizer.eos_token_id) == 1
    assert encoded["id"] == ("e" if shape == "example" else "7")


def test_a_prompt_alone_will_do_and_an_empty_row_is_named():
    tokenizer = load_mini_tokenizer()
    assert encode_prompt(tokenizer, {"prompt": "A dog?"})["completion"] is None
    assert encode_prompt(tokenizer, {"messages": CHAT[:1]})["completion"] is None
    for row in (
        {"id": "x", "prompt": []},
        {"id": "x", "prompt": ""},
        {"id": "x", "text": "A dog?"},
    ):
        with pytest.raises(UserError, match="example"):
            encode_prompt(tokenizer, row, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_trains_on_rows_of_every_shape(shape):
    from kd_notes.models.mini import mini_model

    tokenizer = load_mini_tokenizer()
    student, teacher = (mini_model("causal", "xs", len(tokenizer), seed=s) for s in (0, 1))
    settings = MiniLLMConfig(rollouts=2, max_new_tokens=3, pt_weight=0.0)
    method = MiniLLM(tokenizer, teacher, settings)
    result = train(student, method, [SHAPES[shape]], config(1, batch_size=2))
    assert result.steps == 1 and result.tokens == sum(
        len(r.prompt) + len(r.tokens) for row in method.rollouts.responses for r in row
    )


# ---------------------------------------------------------------- ends and layouts


def test_every_end_of_both_generation_configs_stops_a_response():
    student, teacher = toy(0, ends=[0, 3]), toy(1, ends=[0, 4])
    assert stop_ids(Ids(), student, teacher) == (0, 3, 4)
    assert stop_ids(Ids(), student, None) == (0, 3)
    method = GKD(Ids(), teacher, GKDConfig.recipe("on_policy_kd", rollouts=64, max_new_tokens=12))
    train(student, method, ROWS, config(1, batch_size=64, lr=1e-9))
    responses = [r for row in method.rollouts.responses for r in row]
    ended = {r.tokens[-1] for r in responses if r.finished}
    assert ended == {0, 3, 4}
    assert all(not {0, 3, 4} & set(r.tokens[:-1]) for r in responses)


def test_ids_beyond_the_tokenizer_are_never_drawn():
    "Student and teacher are padded alike; what the rows of the padding say was never trained."
    from kd_notes.models.mini import mini_model

    tokenizer = load_mini_tokenizer()
    known = len(tokenizer)
    student, teacher = (mini_model("causal", "xs", known + 64, seed=s) for s in (0, 1))
    with torch.no_grad():
        student.lm_head.weight[known:] = 100 * student.lm_head.weight[:64]
    method = GKD(tokenizer, teacher, GKDConfig(rollouts=8, max_new_tokens=8))
    train(student, method, list(SHAPES.values())[:1], config(1, batch_size=8, lr=1e-9))
    drawn = [r for row in method.rollouts.responses for r in row if r.source == "student"]
    assert drawn and max(token for r in drawn for token in r.tokens) < known


def test_a_tokenizer_without_padding_trains_on_its_own_text():
    from kd_notes.models.mini import mini_model

    tokenizer = load_mini_tokenizer()
    tokenizer.pad_token = None
    student, teacher = (mini_model("causal", "xs", len(tokenizer), seed=s) for s in (0, 1))
    method = GKD(tokenizer, teacher, GKDConfig(rollouts=4, max_new_tokens=4))
    assert train(student, method, list(SHAPES.values())[:1], config(1)).steps == 1


def test_a_teacher_in_training_mode_speaks_without_dropout():
    found = []
    for training in (False, True):
        teacher = toy(1)
        teacher.transformer.drop.p = 0.5
        method = GKD(Ids(), teacher, GKDConfig(rollouts=4, max_new_tokens=4))
        teacher.train(training)  # after the method was made
        found.append(train(toy(0), method, ROWS, config(1)).history[0]["loss"])
    assert found[0] == found[1]


def test_a_checkpoint_of_a_teacher_in_another_precision_is_refused(tmp_path):
    settings = GKDConfig(rollouts=4, max_new_tokens=4)
    half = toy(1).bfloat16()
    cfg = config(2, save_every=1)
    train(toy(0), GKD(Ids(), half.float(), settings), ROWS, cfg, run_dir=tmp_path)
    with pytest.raises(UserError, match="a run with other method"):
        train(toy(0), GKD(Ids(), half.bfloat16(), settings), ROWS, cfg, run_dir=tmp_path)


def test_a_checkpoint_of_a_student_with_other_ends_is_refused(tmp_path):
    method = GKD(Ids(), toy(1), GKDConfig(rollouts=4, max_new_tokens=4))
    cfg = config(2, save_every=1)
    train(toy(0), method, ROWS, cfg, run_dir=tmp_path)
    with pytest.raises(UserError, match="a run with other student"):
        train(toy(0, ends=[0, 3]), method, ROWS, cfg, run_dir=tmp_path)


def test_a_completion_that_was_cut_has_no_end_to_learn():
    tokenizer = load_mini_tokenizer()
    cut = encode_prompt(tokenizer, TextRow("a", "A dog?", "Yes, it", whole=False))
    assert cut["completion"][-1] != tokenizer.eos_token_id
    row = {"id": "a", "prompt": [1, 2], "completion": [2, 1, 3, 0]}
    finished = [
        gold_responses([row | more], n)[0].finished
        for more, n in (({}, 4), ({}, 3), ({"whole": False}, 4))
    ]
    assert finished == [True, False, False]


def test_a_teacher_that_never_ends_as_the_student_does_is_refused():
    method = GKD(
        Ids(), toy(1, ends=4), GKDConfig.recipe("on_policy_kd", rollouts=4, max_new_tokens=3)
    )
    with pytest.raises(UserError, match=r"ends a response with \[0\], the teacher with \[4\]"):
        train(toy(0), method, ROWS, config(1))


def test_a_teacher_with_another_chat_template_is_refused():
    one, other, none = (SimpleNamespace(chat_template=t) for t in ("a", "b", None))
    with pytest.raises(UserError, match="chat templates"):
        check_templates(one, other)
    check_templates(one, one)
    check_templates(one, none)


# ---------------------------------------------------------------- the phase


class Plain(OnPolicy):
    "The smallest method: two overrides."

    def terms(self):
        return {"kl": Term(1.0)}

    def token_losses(self, student, teacher, columns):
        return {"kl": token_divergence("reverse_kl", student, teacher)}


def test_everything_is_drawn_before_the_batches_of_a_step_are_put_together():
    events = []

    class Watched(Plain):
        def write(self, *args):
            events.append("write")
            return super().write(*args)

        def collate(self, items):
            events.append("collate")
            return super().collate(items)

    method = Watched(Ids(), toy(1), OnPolicyConfig(rollouts=8, inner_epochs=2, max_new_tokens=3))
    train(toy(0), method, ROWS, config(8, batch_size=2, gradient_accumulation_steps=2))
    rollout = ["write", *["collate"] * 8]  # 2 inner epochs of 2 steps of 2 micro-batches
    assert events == rollout * 2


def test_a_method_object_can_train_twice():
    method = Plain(Ids(), toy(1), OnPolicyConfig(rollouts=8, max_new_tokens=3))
    first = train(toy(0), method, ROWS, config())
    second = train(toy(0), method, ROWS, config())
    assert [r["kl"] for r in first.history] == [r["kl"] for r in second.history]
    assert first.tokens == second.tokens


def test_a_batch_is_read_by_the_model_itself():
    method = Plain(Ids(), toy(1), OnPolicyConfig(rollouts=4))
    rows = [RolloutRow([Response("a", [1, 2], [3, 1, 0], "student")])]
    batch = method.collate(rows)
    student = toy(0)
    loss = student(**batch).loss
    logits = student(torch.tensor([[1, 2, 3, 1]])).logits[0, 1:]
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 1, 0]))
    torch.testing.assert_close(loss, wanted)


def test_prompts_go_round_and_a_state_holds_exact_numbers():
    rollouts = Rollouts([{"id": str(i)} for i in range(6)], size=4, seed=0)
    names = [row["id"] for cycle in range(3) for row in rollouts.prompts_of(cycle)]
    assert sorted(names[:6]) == sorted(names[6:]) == [str(i) for i in range(6)]
    response = Response("0", [1], [2], "student", log_student=torch.tensor([math.pi * -1e-7]))
    rollouts.keep(5, {(0, "student"): response})
    other = Rollouts([], size=4, seed=0)
    other.load_state_dict(rollouts.state_dict())
    assert other.responses[0] == [response] and other.cycle == 5


# ---------------------------------------------------------------- faults of others


def with_logs(name, rewards, prompt=(1,), gap=1.0):
    n = len(rewards)
    student = [-gap] * n
    teacher = [reward - gap for reward in rewards]
    return Response(
        name, prompt, [1] * n, "mixed", log_student=student, log_teacher=teacher, log_mix=student
    )


def test_discount_counts_from_the_token_not_from_the_start_of_the_row():
    "TRL #6626: rewards were discounted by their absolute position."
    cfg = MiniLLMConfig(gamma=0.5, length_norm=False, present_reward=True)
    short = with_logs("short", [4.0, 2.0])
    late = with_logs("late", [0.0, 0.0, 0.0, 4.0, 2.0], prompt=[1, 2, 3, 4])
    set_advantages([short, late], cfg)
    assert short.advantage == pytest.approx([5.0, 2.0])
    assert late.advantage[3:] == pytest.approx(short.advantage)


@pytest.mark.parametrize("whiten", ["none", "responses"])
def test_padding_is_in_no_advantage(whiten):
    "TRL #7024: the padding of a batch entered the advantages. The released code's whitening does so too."
    cfg = MiniLLMConfig(whiten=whiten, length_norm=True)
    alone = [with_logs("a", [1.0, -2.0, 3.0]), with_logs("b", [0.5, 0.5])]
    set_advantages(alone, cfg)
    # A longer neighbour without rewards changes nothing but the width of the rectangle,
    # if what is standardised over is held fixed.
    beside = [with_logs("a", [1.0, -2.0, 3.0]), with_logs("b", [0.5, 0.5])]
    if whiten == "none":
        beside.append(with_logs("c", [0.0] * 30))
    set_advantages(beside, cfg)
    for one, other in zip(alone, beside):
        assert len(other.advantage) == len(other.tokens)
        assert one.advantage == pytest.approx(other.advantage)
    values = torch.tensor([x for response in alone for x in response.advantage])
    if whiten == "responses":
        assert values.mean().abs() < 1e-6 and abs(values.var(correction=0) - 1) < 1e-3


# ---------------------------------------------------------------- health


def test_health_of_prefixes_by_hand():
    student = torch.log(torch.tensor([[0.6, 0.3, 0.06, 0.04], [0.1, 0.2, 0.3, 0.4]]))
    teacher = torch.log(torch.tensor([[0.5, 0.4, 0.06, 0.04], [0.4, 0.35, 0.2, 0.05]]))
    seen = prefix_health(student, teacher, torch.tensor([0, 3]))
    assert seen["overlap"].tolist() == [1.0, 0.0]  # the top 2 of 4 tokens
    assert seen["teacher_agrees"].tolist() == [1.0, 0.0]
    assert seen["teacher_logprob"].exp().tolist() == pytest.approx([0.5, 0.05])
    impossible = prefix_health(
        student, teacher.index_fill(1, torch.tensor([3]), -math.inf), torch.tensor([3, 3])
    )
    assert impossible["teacher_logprob"].tolist() == [-100.0] * 2


def test_health_is_of_prefixes_that_the_student_wrote():
    rows = [
        Response("a", [1], [1, 2], "teacher"),
        Response("b", [1], [1, 2, 3], "mixed"),
        Response("c", [1], [1], "gold"),
        Response("d", [1], [4], "replay"),
    ]
    columns = response_batch(rows, 0).columns | response_health(rows)
    columns["target_ids"] = torch.tensor([1, 2, 1, 2, 3, 1, 4])
    assert own_prefixes(columns).tolist() == [False] * 2 + [True] * 3 + [False, True]
    logits = torch.randn(7, VOCABULARY)
    sums = health_sums(logits, logits, columns)
    assert sums["overlap"] == 4  # tokens, all with the same top k
    assert "overlap" not in health_sums(logits, None, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 8, 21])
def test_entropy_a_few_rows_at_a_time_is_that_of_all_rows(rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    logits = (4 * torch.randn(rows, 50, generator=generator)).to(dtype)
    logits[:, 7] = -torch.inf  # a token that a sampler rules out
    probabilities = logits.double().softmax(-1)
    wanted = torch.special.entr(probabilities).sum()
    torch.testing.assert_close(entropy_sum(logits).double(), wanted, atol=1e-5, rtol=1e-5)


def test_health_terms_change_no_gradient_even_where_the_teacher_rules_a_token_out():
    teacher = toy(1)
    head = torch.nn.Linear(8, VOCABULARY)
    with torch.no_grad():
        head.weight.copy_(teacher.lm_head.weight)
        head.bias.copy_(torch.tensor([0.0, 0, 0, 0, -math.inf]))
    teacher.lm_head = head
    method = GKD(
        Ids(), teacher, GKDConfig(rollouts=8, max_new_tokens=4, parts=(Part("forward_kl"),))
    )
    result = train(toy(0), method, ROWS, config(2))
    assert all(math.isfinite(row["loss"]) and row["teacher_logprob"] < -1 for row in result.history)


# ---------------------------------------------------------------- top-k parts


@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
def test_a_reverse_kl_of_the_top_k_is_a_divergence(tail):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 50, 9, dtype=torch.float64)
    part = Part("reverse_kl", top_k=3, tail=tail)
    values = token_divergence("reverse_kl", *top_k_logits(student, teacher, part))
    full = token_divergence("reverse_kl", student, teacher)
    assert (values >= 0).all()
    same = token_divergence("reverse_kl", *top_k_logits(teacher, teacher, part))
    assert same.abs().max() < 1e-12
    if tail == "bucket":
        assert (values <= full + 1e-12).all()
        # A student whose mass is outside the top k pays for the teacher's small tail. With bare
        # probabilities of the top k its loss would be near 0.
        away = teacher.clone().scatter(1, teacher.argmin(-1, keepdim=True), 30.0)
        tail_mass = 1 - teacher.softmax(-1).topk(3, dim=-1).values.sum(-1)
        paid = token_divergence("reverse_kl", *top_k_logits(away, teacher, part))
        torch.testing.assert_close(paid, -tail_mass.log(), atol=1e-6, rtol=1e-6)
    whole = Part("reverse_kl", top_k=9, tail=tail)
    torch.testing.assert_close(
        token_divergence("reverse_kl", *top_k_logits(student, teacher, whole)), full
    )


def test_top_k_parts_train_and_impossible_ones_are_refused():
    parts = [{"divergence": "reverse_kl", "top_k": 2}]
    method = GKD(Ids(), toy(1), GKDConfig(rollouts=8, max_new_tokens=3, parts=parts))
    history = train(toy(0), method, ROWS, config(2)).history
    assert all(row["reverse_kl"] > 0 for row in history)
    for bad in ({"divergence": "nll", "top_k": 2}, {"divergence": "reverse_kl", "top_k": -1}):
        with pytest.raises(UserError, match="top_k"):
            GKDConfig(parts=[bad])
    with pytest.raises(UserError, match="tail"):
        GKDConfig(parts=[{"tail": "cut"}])


def test_off_policy_reverse_kl_learns_from_the_completions_of_the_data():
    settings = GKDConfig.recipe("reverse_kl_gold", rollouts=6, max_new_tokens=3)
    method = GKD(Ids(), toy(1), settings)
    train(toy(0), method, ROWS, config(1, batch_size=6))
    assert {r.source for row in method.rollouts.responses for r in row} == {"gold"}
    assert method.rollouts.drawn == {"gold": 18}


WELL = {"finished": 0.9, "repetition": 0.05, "entropy": 1.0, "overlap": 0.8}
ILL = {"finished": 0.2, "repetition": 0.6, "entropy": 0.05, "overlap": 0.3}


@pytest.mark.parametrize("name", list(ALARMS))
def test_each_alarm_is_raised_by_its_own_measure_and_once(name, recwarn):
    from kd_notes.methods.on_policy import warn_of

    rows = [WELL | {"step": step} for step in range(5)]
    assert health_alarms(rows + rows) == {}
    rows += [WELL | {name: ILL[name], "step": step} for step in range(5, 10)]
    assert list(health_alarms(rows)) == [name]
    warned = set()
    warn_of(rows, warned)
    warn_of(rows, warned)
    assert [str(w.message).startswith("step 9: ") and name in str(w.message) for w in recwarn] == [
        True
    ]


def test_a_student_that_was_odd_from_the_start_raises_no_alarm():
    assert health_alarms([ILL] * 20) == {}
    assert health_alarms([{"loss": 1.0}] * 20) == {}


def test_a_training_warns_before_it_writes_on(tmp_path):
    "Real steps; the history of an ill student is put before them."
    from kd_notes.methods.minillm import MiniLLM
    from kd_notes.models.mini import load_mini_tokenizer, mini_model
    from kd_notes.training.loop import train
    from kd_notes.training.state import TrainConfig

    tokenizer = load_mini_tokenizer()
    student, teacher = (mini_model("causal", "xxs", len(tokenizer), seed=s) for s in (0, 1))
    config = MiniLLM.Config(rollouts=2, inner_epochs=1, max_new_tokens=3, pt_weight=0.0)
    method = MiniLLM(tokenizer, teacher, config)
    begin = method.begin

    def ill_from_here(state):
        begin(state)
        state.history += [WELL | {"step": 0}] * 5 + [WELL | {"step": 0, "repetition": 0.9}] * 5

    method.begin = ill_from_here
    rows = [{"prompt": "one"}, {"prompt": "two"}]
    cfg = TrainConfig(max_steps=2, batch_size=2, lr=1e-3)
    with pytest.warns(UserWarning, match="answers repeat themselves") as caught:
        train(student, method, rows, cfg)
    assert len([w for w in caught if "repeat themselves" in str(w.message)]) == 1
