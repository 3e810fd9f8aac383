"A method in a plain PyTorch loop, in Hugging Face's Trainer, and on rows as TRL has them: the same numbers as in `train`."

import warnings

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from kd_notes.methods.logit_kd import KD
from kd_notes.methods.step_by_step import StepByStep
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.training.loop import train
from kd_notes.training.method import SFT
from kd_notes.training.state import TrainConfig

torch.set_num_threads(1)
TOKENIZER = load_mini_tokenizer()
WORDS = "the cat sat on a mat and saw one red dog".split()
ROWS = [
    {"prompt": " ".join(WORDS[i % 5 : i % 5 + 4]), "completion": " ".join(WORDS[: 1 + i % 7])}
    for i in range(16)
]
REASONS = [
    {"id": str(i), "input": row["prompt"], "label": "dog", "rationale": row["completion"]}
    for i, row in enumerate(ROWS)
]


def student():
    return mini_model("causal", "xs", len(TOKENIZER), seed=0)


def kd(**options):
    return KD(TOKENIZER, mini_model("causal", "s", len(TOKENIZER), seed=1), **options)


METHODS = {
    "SFT": lambda: SFT(TOKENIZER),
    "KD": kd,
    "KD and cross-entropy": lambda: kd(sft_weight=0.5),
    "KD over all logits": lambda: kd(divergence="jsd", beta=0.1, fused=False),
}


def same_weights(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-3)


def in_our_loop(method, rows=ROWS, batch_size=8):
    cfg = TrainConfig(
        max_steps=2,
        batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
        lr=1e-3,
        schedule="constant",
        bucket=False,
        device="cpu",
        log_every=1,
    )
    model = student()
    seen = Seen(method)
    result = train(model, seen, rows, cfg)
    return result.model, seen.batches


class Seen:
    "Passes everything on to a method, and keeps the items of each batch."

    def __init__(self, method):
        self.__dict__.update(method=method, batches=[])

    def __getattr__(self, name):
        return getattr(self.method, name)

    def collate(self, items):
        self.batches.append(items)
        return self.method.collate(items)


@pytest.mark.parametrize("name", [*METHODS, "step by step"])
def test_a_plain_pytorch_loop(name):
    method = StepByStep(TOKENIZER) if name == "step by step" else METHODS[name]()
    rows = REASONS if name == "step by step" else ROWS
    ours, batches = in_our_loop(method, rows)
    model = student().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    items = [item for batch in batches for item in batch]
    for batch in DataLoader(items, batch_size=8, collate_fn=method.collate):
        sums = method.loss_sums(model, batch)
        counts = method.token_counts(batch)
        loss = sum(
            weight * sums[term] / counts[term] for term, weight in method.loss_weights.items()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    same_weights(ours, model)


class Distillation(Trainer):
    "The three lines of `compute_loss`: exact, because the Trainer counts the tokens of a whole step."

    method = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        sums = self.method.loss_sums(model, inputs)
        loss = sum(weight * sums[term] for term, weight in self.method.loss_weights.items())
        return loss / num_items_in_batch


def in_the_trainer(method, items, folder, batch_size):
    arguments = TrainingArguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Distillation(student(), arguments, data_collator=method.collate, train_dataset=items)
    trainer.method = method
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer.model


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch_size", [8, 2])
def test_hugging_faces_trainer_is_exact_under_accumulation(tmp_path, name, batch_size):
    method = METHODS[name]()
    ours, batches = in_our_loop(method)
    items = [item for batch in batches for item in batch]
    lengths = {len(item["completion"]) for item in items}
    assert len(lengths) > 3  # or a mean of means would be right as well
    same_weights(ours, in_the_trainer(method, items, tmp_path, batch_size))


TRL_ROWS = {
    "prompt and completion": {"prompt": "the cat", "completion": "sat on a mat"},
    "chat": {
        "messages": [
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": "sat on a mat"},
        ]
    },
    "prompt and completion as chats": {
        "prompt": [{"role": "user", "content": "the cat"}],
        "completion": [{"role": "assistant", "content": "sat on a mat"}],
    },
}


@pytest.mark.parametrize("form", TRL_ROWS)
def test_rows_as_trl_has_them(form):
    method = SFT(TOKENIZER)
    item = method.encode(TRL_ROWS[form])
    said = TOKENIZER.decode(item["completion"], skip_special_tokens=True).strip()
    assert said == "sat on a mat" and item["completion"][-1] == TOKENIZER.eos_token_id
    assert "the cat" in TOKENIZER.decode(item["prompt"])
    batch = method.collate([item])
    model = student()
    torch.testing.assert_close(
        method.loss_sums(model, batch)["loss"] / method.token_counts(batch)["loss"],
        model(**batch).loss,
    )
