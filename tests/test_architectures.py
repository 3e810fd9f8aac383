"Tiny random models of many families: the logits and the loss of a batch are the model's own, whatever it does to them."

import contextlib
import warnings
from pathlib import Path

import pytest
import torch
from test_tokenizers import tokenizer_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kd_notes.core import read_json
from kd_notes.data.examples import Example
from kd_notes.losses.divergences import token_divergence
from kd_notes.methods.logit_kd import KD
from kd_notes.methods.logit_kd import linear_head
from kd_notes.methods.step_by_step import predict
from kd_notes.models.pretrained import with_dtype
from kd_notes.products.stepwise_request import new_student
from kd_notes.training.batches import (
    plain_logits,
    seq2seq_batch,
    target_logits,
    target_nll,
    target_positions,
)
from kd_notes.training.loop import train
from kd_notes.training.memory import memory_estimate
from kd_notes.training.method import SFT
from kd_notes.training.state import TrainConfig

torch.set_num_threads(1)
VOCAB = 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts_per_tok": 1}
GEMMA = {"head_dim": 8, "sliding_window": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}

# name: (model type, settings, whether the logits are the head applied to the hidden states)
FAMILIES = {
    "GPT-2": ("gpt2", GPT2 | SPECIAL, True),
    "OPT": ("opt", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16}, True),
    "Llama": ("llama", COMMON, True),
    "Qwen 2": ("qwen2", COMMON, True),
    "Qwen 3": ("qwen3", COMMON | {"head_dim": 8}, True),
    "Gemma 1": ("gemma", COMMON | {"head_dim": 8}, True),
    "Gemma 2": ("gemma2", COMMON | GEMMA | {"final_logit_softcapping": 2.0}, False),
    "Gemma 3": ("gemma3_text", COMMON | GEMMA, True),
    "Gemma 3 with images": (
        "gemma3",
        {"text_config": COMMON | GEMMA, "vision_config": VISION},
        True,
    ),
    "Phi": ("phi", COMMON, True),
    "SmolLM3": ("smollm3", COMMON, True),
    "Mistral": ("mistral", COMMON | {"sliding_window": 8}, True),
    "Mixtral": ("mixtral", COMMON | EXPERTS | {"num_local_experts": 2}, True),
    "Qwen 2 MoE": (
        "qwen2_moe",
        COMMON
        | EXPERTS
        | {"num_experts": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        True,
    ),
    "OLMo": ("olmo", COMMON, True),
    "OLMo 2": ("olmo2", COMMON, True),
    "GPT-NeoX": ("gpt_neox", COMMON, True),
    "Cohere": ("cohere", COMMON | {"logit_scale": 0.06}, False),
    "Granite": ("granite", COMMON | {"logits_scaling": 4.0}, False),
    "nanochat": ("nanochat", COMMON, False),
    "T5": ("t5", T5 | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}, False),
    "BART": ("bart", BART | SPECIAL, False),
}
ROWS = [
    {"prompt": [2, 5, 6, 7, 8], "completion": [9, 10, 11, 1]},
    {"prompt": [2, 5], "completion": [9, 10, 11, 12, 13, 1]},
    {"prompt": [4, 30, 31, 32], "completion": [40, 41]},
    {"prompt": [2, 33, 34], "completion": [0, 35, 1]},  # a token that also pads
]


class Ids:
    pad_token_id, eos_token_id = 0, 1

    def __len__(self):
        return VOCAB


class Rows(SFT):
    def encode(self, example):
        return example


def tiny(name, dtype=torch.float32, **changes):
    kind, settings, _ = FAMILIES[name]
    config = AutoConfig.for_model(kind, **settings | changes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    with warnings.catch_warnings(), contextlib.redirect_stderr(None):
        warnings.simplefilter("ignore")
        model = auto.from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # off their defaults, or a missing bias would not show
            p.add_(torch.randn_like(p) * 0.08)
    return model.to(dtype).eval()


def method_for(model, kind=Rows):
    return kind(Ids(), "t5" if model.config.is_encoder_decoder else "causal")


def test_the_table_of_the_site_names_these_families():
    lesson = read_json(Path(__file__).parents[1] / "nbs" / "2_playground" / "09_pretrained.ipynb")
    lines = [line for cell in lesson["cells"] for line in "".join(cell["source"]).splitlines()]
    named = [line for line in lines if line.startswith("| ") and "| `" in line]
    assert named == [
        f"| {name} | `{kind}` | {'yes' if plain else 'no'} |"
        for name, (kind, _, plain) in FAMILIES.items()
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_loss_of_a_batch_are_the_models_own(name):
    model = tiny(name)
    batch = method_for(model).collate(ROWS)
    with torch.no_grad():
        own = model(**batch)
        ours = target_logits(model, batch)
        index, ids = target_positions(batch)
        full = own.logits.flatten(0, 1)[index]
        nll = target_nll(model, batch)
    torch.testing.assert_close(ours, full, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(nll.mean(), own.loss, atol=1e-5, rtol=1e-5)
    assert ids.tolist() == [token for row in ROWS for token in row["completion"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_batch_are_what_they_are_alone(name):
    model = tiny(name)
    method = method_for(model)
    with torch.no_grad():
        together = target_nll(model, method.collate(ROWS))
        alone = torch.cat([target_nll(model, method.collate([row])) for row in ROWS])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_plain_heads_are_applied_apart(name):
    model = tiny(name).train()
    state = torch.get_rng_state()
    assert plain_logits(model) is FAMILIES[name][2]
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_model_is_the_one_that_is_loaded_in_this_precision(name, tmp_path):
    "Rotary frequencies stay in float32: rounded ones turn later positions by wrong angles."
    model = tiny(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept = before.keys() - model.state_dict().keys()
    converted = with_dtype(model, torch.bfloat16)
    assert converted is model and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.named_buffers())
    for each in kept:
        assert buffers[each].dtype == before[each].dtype and buffers[each].equal(before[each])
    batch = method_for(model).collate(ROWS)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_a_change_behind_the_head_is_noticed_without_a_setting():
    class Squashed(type(tiny("Llama"))):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 30 * torch.tanh(out.logits / 30)  # too little to be seen in small logits
            return out

    model = tiny("Llama")
    model.__class__ = Squashed
    assert not plain_logits(model) and linear_head(model) is None


@pytest.mark.parametrize("name", ["Gemma 2", "Cohere", "Gemma 3 with images", "Mixtral", "Llama"])
def test_distillation_compares_the_models_own_logits(name):
    teacher = tiny("Llama")
    student = tiny(name)
    batch = Rows(Ids()).collate(ROWS)
    index, _ = target_positions(batch)
    with torch.no_grad():
        ours = KD(Ids(), teacher).loss_sums(student, batch)["kd"]
        logits = [model(**batch).logits.flatten(0, 1)[index] for model in (student, teacher)]
    torch.testing.assert_close(ours, token_divergence("forward_kl", *logits).sum())


@pytest.mark.parametrize("name", ["Mixtral", "Qwen 2 MoE", "Gemma 3 with images", "BART", "Llama"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_family_trains_and_has_an_estimate(name, precision):
    model = tiny(name)
    cfg = TrainConfig(
        max_steps=2, batch_size=2, lr=1e-2, device="cpu", precision=precision, log_every=1
    )
    estimate = memory_estimate(model.config, cfg, length=12, teacher=tiny("Llama").config)
    assert estimate["activations"] > 0 and estimate["total"] > estimate["weights"]
    result = train(model, method_for(model), ROWS, cfg)
    assert result.history[-1]["loss"] < result.history[0]["loss"] + 1


@pytest.mark.parametrize("name", ["BART", "T5"])
def test_a_decoder_is_trained_from_the_token_it_starts_with(name):
    model = tiny(name)
    rows = [(row["prompt"], row["completion"]) for row in ROWS]
    learned = TrainConfig(max_steps=200, batch_size=4, lr=1e-2, device="cpu")
    train(model, method_for(model), ROWS, learned)
    batch = seq2seq_batch(rows[:3], 0)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    made = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    for said, (_, wanted) in zip(made.tolist(), rows):
        assert said[0] == model.config.decoder_start_token_id
        assert said[1 : 1 + len(wanted)] == wanted


def greedy_of(model, tokenizer, family, rows):
    examples = [Example(str(i), "nli", text) for i, text in enumerate(rows)]
    made = predict(model, tokenizer, examples, prefix="", family=family, max_new_tokens=8)
    return [made[example.id] for example in examples]


@pytest.mark.parametrize("name, family", [("Llama", "causal"), ("BART", "t5")])
def test_answers_do_not_depend_on_penalties_and_forced_tokens_of_a_config(name, family):
    "A student learns without them: BART's forced first token would be one that it never read."
    tokenizer = tokenizer_of()
    tokenizer.pad_token = None
    model = tiny(name, vocab_size=len(tokenizer))
    rows = ["the cat", "the dog ran after the red ball", "sky"]
    plain = greedy_of(model, tokenizer, family, rows)
    stored = model.generation_config
    changes = {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 2,
        "min_length": 6,
        "num_beams": 2,
    }
    changes |= {"forced_bos_token_id": 7, "suppress_tokens": list(range(20, 200))}
    for setting, value in changes.items():
        setattr(stored, setting, value)
    assert greedy_of(model, tokenizer, family, rows) == plain
    assert model.generation_config is stored and stored.num_beams == 2
    student = new_student((model, tokenizer), 0, 0, "cpu")[0].generation_config
    start = model.config.decoder_start_token_id if family == "t5" else None
    assert (student.num_beams or 1, student.forced_bos_token_id) == (1, None)
    assert student.eos_token_id == stored.eos_token_id and student.decoder_start_token_id == start
