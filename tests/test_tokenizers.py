"""Tokenizers as users have them: start tokens, ends of turns, holes in the vocabulary, no end, no padding, named templates."""

import json
import math
import warnings

import pytest
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, Tokenizer, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kd_notes import distill, KD, OtherTokenizer, read_row, SFT, step_rows, StepByStep, UserError
from kd_notes.data.dialogues import (
    chat_template_of,
    encode_row,
    PLAIN_TEMPLATE,
    prompt_ids,
    start_ids,
    turn_end_id,
)
from kd_notes.evaluation.calibration import score_labels
from kd_notes.evaluation.text import token_nll, write_answers
from kd_notes.methods.prompts import encode_prompt
from kd_notes.methods.rollouts import encode_corpus
from kd_notes.methods.seqkd import write_responses, Writing
from kd_notes.methods.step_by_step import PREDICT
from kd_notes.models.pretrained import check_vocabulary, vocabulary_size

SPECIALS = ["<pad>", "<s>", "</s>", "<turn_end>"]
TEXTS = ["the cat sat on the mat and the dog ran after the red ball", "what is the sky"] * 3


def tokenizer_of(eos="</s>", pad="<pad>", template=None, extra=(), specials=SPECIALS, bos=False):
    "Byte-level BPE of about 300 entries: 0 <pad>, 1 <s>, 2 </s>, 3 <turn_end>."
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, show_progress=False, initial_alphabet=alphabet
    )
    bpe.train_from_iterator(TEXTS, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    named = {"eos_token": eos, "pad_token": pad, "bos_token": "<s>"}
    named = {name: token for name, token in named.items() if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
    tokenizer.add_tokens(list(extra))
    tokenizer.chat_template = template
    return tokenizer


def llama(vocab, seed=0, kind=LlamaForCausalLM):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return kind(config).eval()


TURNS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<turn_end>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXT = {"id": "a", "prompt": "the cat", "completion": "sat"}
CHAT = read_row(TEXT, chat=True)
FAST = {"max_steps": 2, "batch_size": 2, "validation": 2, "evaluations": 1, "device": "cpu"}
FAST |= {"max_length": 64, "max_new_tokens": 6}
ROWS = [{"prompt": f"the {a}", "response": f"{b} ran"} for a in ("cat", "dog") for b in "abcdef"]


# --- the start ------------------------------------------------------------------------------------------------------------------------


def test_a_text_begins_as_its_tokenizer_begins_it():
    tok, plain = tokenizer_of(bos=True), tokenizer_of()
    assert start_ids(tok) == [1] and start_ids(plain) == []
    layouts = {
        "text": SFT(tok).encode(TEXT)["prompt"],
        "kd": KD(tok, llama(300)).encode(TEXT)["prompt"],
        "chat": prompt_ids(CHAT.prompt, tok),
        "step by step": StepByStep(tok).encode(
            step_rows([{"input": "the cat", "label": "sat", "rationale": "why"}])[0]
        )[0][1],
    }
    for name, ids in layouts.items():
        assert ids[0] == 1 and ids[1] != 1, name
    assert 1 not in SFT(plain).encode(TEXT)["prompt"]
    assert layouts["text"][1:] == SFT(plain).encode(TEXT)["prompt"]
    # the completion goes on, and does not begin again
    assert 1 not in SFT(tok).encode(TEXT)["completion"]


def test_scores_and_written_answers_begin_as_the_training_did():
    tok = tokenizer_of(bos=True)
    begun = StepByStep(tok).encode(step_rows([{"input": "the cat", "label": "sat"}])[0])[0][1]
    asked = PREDICT + "the cat"
    model = llama(len(tok)).eval().requires_grad_(False)
    (scores,) = score_labels(model, tok, [asked], [["sat", "ran"]])
    for label, found in zip(scores.labels, scores.probabilities):
        learnt = tok.encode(label, add_special_tokens=False) + [2]
        (nll,) = token_nll(model, [begun], [learnt])
        assert found * scores.mass == pytest.approx(math.exp(-nll.sum()), rel=1e-4)
    how = {"seeds": (1,), "max_new_tokens": 2}
    written = write_answers(model, tok, [{"prompt": asked}, CHAT], **how)
    assert written.prompt_ids == [begun, prompt_ids(CHAT.prompt, tok)]


def test_a_template_that_writes_its_start_gets_no_second_one():
    tok = tokenizer_of(bos=True, template="{{ bos_token }}" + TURNS)
    assert prompt_ids(CHAT.prompt, tok).count(1) == 1


def test_the_students_saved_template_writes_the_start():
    tok = tokenizer_of(bos=True)
    tok.chat_template = chat_template_of(tok)
    assert tok.chat_template == "{{ bos_token }}" + PLAIN_TEMPLATE
    assert prompt_ids(CHAT.prompt, tok).count(1) == 1


# --- the end --------------------------------------------------------------------------------------------------------------------------


def test_a_chat_ends_with_the_templates_end_of_turn_and_a_text_with_the_end_of_text():
    tok = tokenizer_of(template=TURNS)
    assert turn_end_id(tok) == 3
    assert encode_row(CHAT, tok)["completion"][-1] == 3
    assert encode_row(TEXT, tok)["completion"][-1] == 2
    assert encode_row(CHAT, tokenizer_of())["completion"][-1] == 2


@pytest.mark.parametrize("end", ["{{ eos_token }}", "", " (end)", "{{ '\n' }}"])
def test_a_template_without_an_end_of_turn_means_the_end_of_text(end):
    template = "{% for m in messages %}{{ m['content'] }}" + end + "{% endfor %}"
    assert turn_end_id(tokenizer_of(template=template)) == 2


def test_another_tokenizers_end_of_turn_is_compared_too():
    method = KD(tokenizer_of(), OtherTokenizer(llama(300), tokenizer_of(template=TURNS)), "uld")
    item = method.encode(CHAT)
    assert item["completion"][-1] == 2 and item["teacher_completion"][-1] == 3
    assert len(item["ends"]) == len(item["completion"])


class Talker(LlamaForCausalLM):
    "Says x, then the mark of the end of a turn, then y for ever."

    path: dict = {}
    first = 0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        seen = kwargs["input_ids"][:, -1].tolist()
        following = torch.tensor([self.path.get(token, self.first) for token in seen])
        flat = torch.full_like(out.logits, -20.0)
        index = following[:, None, None].expand(-1, out.logits.shape[1], 1)
        out.logits = flat.scatter(-1, index, 20.0)
        return out


@pytest.mark.parametrize("how", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("declared", ["generation config", "one id", "template"])
def test_an_answer_stops_at_every_end_that_the_model_declares(how, declared, tmp_path):
    tok = tokenizer_of(template=TURNS if declared == "template" else None)
    x, y = (tok.encode(letter)[0] for letter in "xy")
    model = llama(len(tok), kind=Talker)
    model.path, model.first = {x: 3, 3: y, y: y}, x
    ids = {"generation config": [2, 3], "one id": 3, "template": None}[declared]
    model.generation_config.eos_token_id = ids
    rows = [read_row({"id": "a", "prompt": "the cat", "response": "-"}, chat=True)]
    writing = Writing(how, 8, width=2)
    (answer,) = write_responses(tmp_path / "a.jsonl", model, tok, rows, writing)
    assert answer.completion == "x" and answer.whole


@pytest.mark.parametrize("objective", ["sft", "forward_kl", "seqkd"])
def test_no_end_token_is_a_clear_error_before_anything_is_computed(objective, tmp_path):
    tok = tokenizer_of(eos=None, pad=None)
    model = llama(len(tok))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        distill(ROWS, (model, tok), "layers:1", objective, tmp_path / "o", **FAST)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        SFT(tok).encode(TEXT)


def test_no_padding_token_is_no_problem(tmp_path):
    tok = tokenizer_of(pad=None)
    method = SFT(tok)
    batch = method.collate([method.encode(TEXT), method.encode(TEXT | {"prompt": "a"})])
    assert batch["labels"][1, -1] == -100
    assert distill(ROWS, (llama(len(tok)), tok), "layers:1", "sft", tmp_path / "o", **FAST)["rows"]


# --- the vocabulary -------------------------------------------------------------------------------------------------------------------


def with_a_hole():
    "301 entries; the end token has id 340."
    spec = json.loads(tokenizer_of(eos=None, specials=["<pad>", "<s>"]).backend_tokenizer.to_str())
    end = max(spec["model"]["vocab"].values()) + 41
    spec["model"]["vocab"]["</s>"] = end
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": end, "content": "</s>", "special": True} | flags)
    names = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}
    bpe = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names), end


def test_a_hole_in_the_vocabulary_is_counted_by_the_largest_id(tmp_path):
    tok, end = with_a_hole()
    assert len(tok) < vocabulary_size(tok) == end + 1
    small = llama(len(tok))
    with pytest.raises(UserError, match="embeddings"):
        check_vocabulary(small, tok)
    with pytest.raises(UserError, match="embeddings"):
        distill(ROWS, (small, tok), "layers:1", "forward_kl", tmp_path / "o", **FAST)


def test_a_teacher_can_end_its_answer_with_an_id_beyond_the_number_of_entries(tmp_path):
    tok, end = with_a_hole()
    model = llama(end + 1)
    model.lm_head = torch.nn.Linear(32, end + 1)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[tok.encode("x")[0]] = 1.0
        model.lm_head.bias[end] = 9.0
    rows = [read_row(TEXT, chat=True)]
    write_responses(tmp_path / "a.jsonl", model, tok, rows, Writing("greedy", 6))
    assert json.loads((tmp_path / "a.jsonl").read_text())["whole"]


@pytest.mark.parametrize("objective", ["forward_kl", "cached_forward_kl", "sft", "seqkd"])
def test_a_token_that_only_the_student_has(objective, tmp_path):
    old, new = tokenizer_of(), tokenizer_of(extra=("<extra>",))
    teacher, student = (llama(len(old)), old), (llama(len(new), seed=1), new)
    rows = ROWS + [{"id": f"e{i}", "prompt": "the", "response": "sat <extra>"} for i in range(4)]
    call = (rows, teacher, student, objective, tmp_path / "o")
    if objective in ("sft", "seqkd"):  # no ids are compared; the teacher reads text its own way
        report = distill(*call, **FAST)
        assert "forward_kl" not in report["results"]["student"]
        return
    with pytest.raises(UserError, match="row 1[2-5]: the token '<extra>'"):
        distill(*call, **FAST)


# --- templates ------------------------------------------------------------------------------------------------------------------------


def test_of_named_templates_the_default_is_meant(tmp_path):
    named = tokenizer_of(template={"default": TURNS, "tool_use": "{{ 'no' }}"})
    assert encode_row(CHAT, named) == encode_row(CHAT, tokenizer_of(template=TURNS))
    model = llama(len(named))
    assert distill(ROWS, (model, named), "layers:1", "sft", tmp_path / "o", **FAST)["rows"]
    without = tokenizer_of(template={"tool_use": TURNS, "rag": TURNS})
    with pytest.raises(UserError, match="tool_use, rag.*default"):
        encode_row(CHAT, without)


# --- prompt and completion --------------------------------------------------------------------------------------------------------------


def with_spaces(kind):
    "A tokenizer that puts a space before every text, as Llama 2's (Metaspace) or RoBERTa's (bytes)."
    tokenizer = tokenizer_of()
    if kind == "bytes":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    bpe.decoder = decoders.Metaspace(prepend_scheme=kind)
    texts = [*TEXTS, "\n=:.,!?", "assistant user", "the cat\nsat: "]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIALS, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    named = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **named)


@pytest.mark.parametrize("kind", ["always", "first", "bytes", "none"])
def test_a_completion_that_begins_with_a_space_has_one(kind):
    "The tokenizer's own space takes its place."
    tokenizer = tokenizer_of() if kind == "none" else with_spaces(kind)
    row = {"prompt": "the cat", "completion": " sat"}
    encoded = encode_row(row, tokenizer)
    whole = tokenizer.encode("the cat sat", add_special_tokens=False)
    assert encoded["prompt"] + encoded["completion"] == [*whole, 2]
    assert encode_prompt(tokenizer, row)["completion"] == encoded["completion"]


def test_spaces_of_two_tokenizers_are_compared_at_the_same_places():
    method = KD(with_spaces("always"), OtherTokenizer(llama(300), tokenizer_of()), "spans_uld")
    item = method.encode({"id": "a", "prompt": "the cat", "completion": " sat on"})
    assert item["ends"][-1] == item["teacher_ends"][-1] and 4 in item["ends"]


def test_the_end_of_a_turn_follows_the_end_token():
    template = "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    tokenizer = tokenizer_of(template=template)
    assert turn_end_id(tokenizer) == 2
    tokenizer.eos_token = "<turn_end>"
    assert turn_end_id(tokenizer) == 3


def template_warnings(template, rows=3):
    tokenizer = tokenizer_of(template=template)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(rows):
            encode_row(
                read_row({"prompt": f"the cat {i}", "completion": "sat"}, chat=True), tokenizer
            )
    return [str(w.message) for w in caught if "chat template" in str(w.message)]


def test_a_template_that_forgets_the_header_of_an_answer_is_said_once():
    forgets = TURNS.partition("{% if add_generation_prompt")[0]
    (said,) = template_warnings(forgets)
    assert "add_generation_prompt" in said and "'assistant: '" in said
    mended = forgets + said[said.index("{% if") :].rstrip(".")
    assert template_warnings(mended) == []


@pytest.mark.parametrize(
    "template",
    [
        TURNS,
        None,  # the plain one
        "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",  # of a base model
        "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' "
        "else ' ' + m['content'] + eos_token }}{% endfor %}",  # Mistral's: the answer follows at once
        "{% for m in messages %}{{ m['content'] if loop.last else '' }}{% endfor %}",
    ],
)
def test_a_template_without_a_header_needs_none(template):
    assert template_warnings(template) == []


@pytest.mark.parametrize("wrong", ["1/0", "messages[0]['content'] + 3", "messages[9].x.y"])
def test_whatever_a_template_raises_is_one_clear_error(wrong):
    tokenizer = tokenizer_of(template="{% for m in messages %}{{ " + wrong + " }}{% endfor %}")
    with pytest.raises(UserError, match="chat template refuses"):
        encode_row(CHAT, tokenizer)


def test_a_corpus_text_begins_as_its_tokenizer_begins_it():
    ids = encode_corpus(tokenizer_of(bos=True), ["the cat sat"], 20)[0]
    assert (ids[0], ids.count(1), ids[-1]) == (1, 1, 2)
    assert encode_corpus(tokenizer_of(), ["the cat sat"], 20)[0] == ids[1:]
