"""An importer's first ten lines: the snippets that a user of TRL, torchtune or plain PyTorch writes, and the lazy names of the package."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import kd_notes
from kd_notes import (
    distill,
    forward_kl,
    hidden_states,
    KD,
    load_mini_tokenizer,
    LogitCache,
    Method,
    mini_model,
    MiniLLM,
    MiniLLMConfig,
    next_token_labels,
    onpolicy_method,
    read_rows,
    sample,
    SFT,
    step_rows,
    StepByStep,
    target_logits,
    token_divergence,
    train,
    TrainConfig,
    UserError,
    write_cache,
)

ROOT = Path(__file__).resolve().parent.parent
TOK = load_mini_tokenizer()
V = len(TOK)
WORDS = "river bread rain cloud early late water flour".split()
PAIRS = [
    {"id": str(i), "prompt": f"Say {WORDS[i]}:", "completion": f" {WORDS[-1 - i]}."}
    for i in range(8)
]
STEPS = TrainConfig(max_steps=2, batch_size=4, lr=1e-3, log_every=1, device="cpu")


def student(seed: int = 1):
    return mini_model("causal", "xs", V, seed=seed)


@pytest.fixture(scope="module")
def teacher():
    return mini_model("causal", "xs", V, seed=0)


def finite(result) -> list[float]:
    losses = [row["loss"] for row in result.history]
    assert losses and torch.tensor(losses).isfinite().all()
    return losses


def field_batch() -> dict[str, torch.Tensor]:
    "input_ids, attention_mask, labels with -100, as any Hugging Face collator makes them."
    ids, labels = [], []
    for row in PAIRS[:4]:
        prompt = TOK.encode(row["prompt"], add_special_tokens=False)
        completion = TOK.encode(row["completion"], add_special_tokens=False) + [TOK.eos_token_id]
        ids.append(prompt + completion)
        labels.append([-100] * len(prompt) + completion)
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([x + [TOK.pad_token_id] * (width - len(x)) for x in ids]),
        "attention_mask": torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in ids]),
        "labels": torch.tensor([x + [-100] * (width - len(x)) for x in labels]),
    }


# --- losses on one's own logits -------------------------------------------------------------------------------------------------------


def test_01_a_plain_loop_with_a_mask(teacher):
    batch, model = field_batch(), student()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    s = model(**inputs).logits[:, :-1]
    with torch.no_grad():
        t = teacher(**inputs).logits[:, :-1]
    loss = forward_kl(s, t, mask=batch["labels"][:, 1:] != -100)
    loss.backward()
    assert loss > 0 and model.lm_head.weight.grad.abs().sum() > 0


def test_09_labels_instead_of_a_mask(teacher):
    batch, model = field_batch(), student()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        s, t = model(**inputs).logits, teacher(**inputs).logits
        masked = forward_kl(s[:, :-1], t[:, :-1], mask=batch["labels"][:, 1:] != -100)
        labels = next_token_labels(batch["labels"])
        torch.testing.assert_close(forward_kl(s, t, labels=labels), masked)


def trainer_of(tmp_path, model, compute, collator, data, **arguments):
    transformers = pytest.importorskip("transformers")

    class Distiller(transformers.Trainer):
        compute_loss = compute

    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    args = transformers.TrainingArguments(**settings | arguments)
    return Distiller(model=model, args=args, data_collator=collator, train_dataset=data)


def test_02_a_hugging_face_trainer_is_exact_under_accumulation(tmp_path, teacher):
    def compute(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        with torch.no_grad():
            t = teacher(**inputs).logits
        s = model(**inputs).logits
        labels = next_token_labels(labels)
        return forward_kl(s, t, labels=labels, denominator=num_items_in_batch)

    rows = field_batch()
    data = [{name: tensor[i] for name, tensor in rows.items()} for i in range(4)]

    def collator(items):
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    weights = []
    for size, parts in ((4, 1), (2, 2)):
        model = student()
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        trainer = trainer_of(tmp_path, model, compute, collator, data, max_steps=1, **sizes)
        trainer.train()
        weights.append(model.lm_head.weight.detach().clone())
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-4)
    assert not torch.equal(weights[0], student().lm_head.weight)


# --- methods in another loop ----------------------------------------------------------------------------------------------------------


def test_03_a_data_loader_and_a_plain_loop(teacher):
    method, model = KD(TOK, teacher), student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    means = []
    for _ in range(4):
        items = [method.encode(row) for row in PAIRS]
        for batch in DataLoader(items, batch_size=4, collate_fn=method.collate):
            loss = method.loss_sums(model, batch)["kd"] / method.token_counts(batch)["kd"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            means.append(loss.item())
    assert means[-1] < means[0]


def test_04_a_hugging_face_trainer_with_our_collator(tmp_path, teacher):
    method, model = KD(TOK, teacher, sft_weight=0.5), student()

    def compute(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        sums, counts = method.loss_sums(model, inputs), method.token_counts(inputs)
        return sum(weight * sums[k] / counts[k] for k, weight in method.loss_weights.items())

    before = model.lm_head.weight.detach().clone()
    items = [method.encode(row) for row in PAIRS]
    trainer_of(tmp_path, model, compute, method.collate, items).train()
    assert not torch.equal(before, model.lm_head.weight)


def test_05_a_method_of_ones_own_is_a_subclass():
    class Doubled(SFT):
        def loss_sums(self, model, batch):
            return {"loss": 2 * super().loss_sums(model, batch)["loss"]}

    once, twice = (
        train(student(), m(TOK), PAIRS, STEPS).history[0]["loss"] for m in (SFT, Doubled)
    )
    assert twice == pytest.approx(2 * once, rel=1e-6)


def test_06_a_plain_module_on_images(tmp_path):
    class Images(Method):
        def num_tokens(self, item):
            return 1

        def collate(self, items):
            images, labels = zip(*items)
            return {"images": torch.stack(images), "labels": torch.tensor(labels)}

        def token_counts(self, batch):
            return {"loss": len(batch["labels"])}

        def loss_sums(self, model, batch):
            logits = model(batch["images"])
            return {"loss": F.cross_entropy(logits, batch["labels"], reduction="sum")}

    torch.manual_seed(0)
    data = [(torch.randn(1, 8, 8) + label, label) for label in (0, 1) * 8]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    config = TrainConfig(max_steps=20, batch_size=8, lr=3e-2, log_every=1, device="cpu")
    losses = finite(train(model, Images(), data, config, run_dir=tmp_path))
    assert losses[-1] < 0.5 * losses[0]


def test_07_on_policy_distillation_by_hand(teacher):
    from kd_notes.generation.sampling import Sampling

    model = student()
    prompts = [TOK.encode(row["prompt"], add_special_tokens=False) for row in PAIRS[:3]]
    rollout = sample(model, prompts, Sampling(6, stop_ids=(TOK.eos_token_id,), seed=0))
    batch = rollout.batch(TOK.pad_token_id)
    with torch.no_grad():
        t = target_logits(teacher, batch)
    loss = token_divergence("reverse_kl", target_logits(model, batch), t).mean()
    loss.backward()
    assert loss > 0 and model.lm_head.weight.grad.abs().sum() > 0


# --- the field's batch ----------------------------------------------------------------------------------------------------------------


def test_10_the_names_that_an_importer_wants():
    from kd_notes import forward_kl as loss, KD as method, train as loop

    assert callable(loss) and callable(loop) and issubclass(method, SFT)


def test_11_kd_reads_a_batch_of_the_field(teacher):
    method, model = KD(TOK, teacher, sft_weight=0.5), student()
    theirs, ours = field_batch(), method.collate([method.encode(row) for row in PAIRS[:4]])
    assert method.token_counts(theirs) == method.token_counts(ours)
    with torch.no_grad():
        a, b = method.loss_sums(model, theirs), method.loss_sums(model, ours)
    for term in ("kd", "sft"):
        torch.testing.assert_close(a[term], b[term], rtol=1e-5, atol=1e-5)


def test_12_the_models_own_loss_is_never_none():
    method, model = SFT(TOK), student()
    batch = method.collate([method.encode(row) for row in PAIRS[:4]])
    with torch.no_grad():
        own = model(**batch).loss
        mean = method.loss_sums(model, batch)["loss"] / method.token_counts(batch)["loss"]
    torch.testing.assert_close(own, mean, rtol=1e-5, atol=1e-6)


# --- rows in the shapes that people have ----------------------------------------------------------------------------------------------

TEXTS = {
    "prompt and completion": PAIRS,
    "prompt and response": [{"prompt": r["prompt"], "response": r["completion"]} for r in PAIRS],
    "instruction": [
        {"instruction": r["prompt"], "input": "", "output": r["completion"]} for r in PAIRS
    ],
    "input and label": [
        {"input": r["prompt"], "label": r["completion"], "rationale": None} for r in PAIRS
    ],
}


def chat(row: dict) -> list[dict]:
    return [
        {"role": "user", "content": row["prompt"].strip()},
        {"role": "assistant", "content": row["completion"].strip()},
    ]


CHATS = {
    "messages": [{"messages": chat(row)} for row in PAIRS],
    "conversational": [{"prompt": chat(row)[:1], "completion": chat(row)[1:]} for row in PAIRS],
}


@pytest.mark.parametrize("rows", [pytest.param(v, id=k) for k, v in (TEXTS | CHATS).items()])
@pytest.mark.parametrize("method", ["sft", "kd"])
def test_13_14_every_shape_of_rows_trains(rows, method, teacher):
    made = SFT(TOK) if method == "sft" else KD(TOK, teacher)
    finite(train(student(), made, rows, STEPS))


@pytest.mark.parametrize("shapes", [TEXTS, CHATS], ids=["texts", "chats"])
def test_one_row_in_several_shapes_is_one_row(shapes):
    for rows in zip(*shapes.values()):
        items = [SFT(TOK).encode(row) for row in rows]
        assert len({json.dumps([item["prompt"], item["completion"]]) for item in items}) == 1


def test_a_plain_text_gets_no_template_and_a_chat_does():
    text, messages = SFT(TOK).encode(PAIRS[0]), SFT(TOK).encode(CHATS["messages"][0])
    assert TOK.decode(text["prompt"]) == PAIRS[0]["prompt"]
    assert "### Instruction:" in TOK.decode(messages["prompt"])


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"prompt": "a"}, "'response' is missing"),
        ({"question": "a", "answer": "b"}, "no prompt among them"),
        ({"prompt": "a", "completion": 3}, "is not text"),
        ({"prompt": "a", "completion": " "}, "is empty"),
        ({"messages": []}, "no prompt among them"),
        ({"messages": [{"role": "user", "content": "a"}]}, "at least two"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": []}, "at least two"),
        ("just a text", "cannot be a str"),
        (None, "cannot be a NoneType"),
        (7, "cannot be a int"),
    ],
)
@pytest.mark.parametrize("method", ["sft", "kd"])
def test_a_row_that_cannot_work_is_one_clear_error(row, problem, method, teacher):
    made = SFT(TOK) if method == "sft" else KD(TOK, teacher)
    with pytest.raises(UserError, match=problem):
        train(student(), made, [row, row], STEPS)


def test_blocks_of_text_and_nulls_of_other_columns_are_read():
    block = [{"type": "text", "text": "Say "}, {"type": "text", "text": "it."}]
    row = {
        "messages": [{"role": "user", "content": block}, {"role": "assistant", "content": "It."}]
    }
    plain = {"messages": None, "prompt": "Say it.", "completion": "It.", "rationale": None}
    assert "Say it." in TOK.decode(SFT(TOK).encode(row)["prompt"])
    assert TOK.decode(SFT(TOK).encode(plain)["prompt"]) == "Say it."
    picture = [{"type": "image", "url": "x"}]
    row["messages"][0]["content"] = picture
    with pytest.raises(UserError, match="a block that is not text"):
        SFT(TOK).encode(row)


@pytest.mark.parametrize("nothing", [None, float("nan"), [], ()])
def test_a_column_that_only_other_rows_use_is_absent(nothing):
    row = {"messages": nothing, "id": nothing, "rationale": nothing, "instruction": nothing}
    (made,) = read_rows([row | {"prompt": "a", "response": nothing, "completion": "b"}])
    assert (made.id, made.prompt, made.completion, made.rationale) == ("row-0", "a", "b", "")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi \ud83d", "response": "b"},
        {"prompt": "a", "response": "\ude00"},
        {"input": "a", "label": "b", "rationale": "\ud83d"},
        {
            "messages": [
                {"role": "user", "content": "\ud83d"},
                {"role": "assistant", "content": "b"},
            ]
        },
    ],
)
def test_half_a_character_in_a_row_is_one_clear_error(row):
    with pytest.raises(UserError, match="row 0.*half a character"):
        read_rows([row])


@pytest.mark.parametrize("rationale", [5, ["because"], {"a": 1}])
def test_a_rationale_that_is_no_text_is_one_clear_error(rationale):
    with pytest.raises(UserError, match="'rationale' is not text"):
        read_rows([{"input": "a", "label": "b", "rationale": rationale}])


# --- on-policy ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [TEXTS["prompt and response"], PAIRS, CHATS["messages"], CHATS["conversational"]],
    ids=["08 prompt and response", "15 prompt and completion", "16 messages", "conversational"],
)
def test_08_15_16_gkd_reads_the_same_rows(rows, teacher):
    method = onpolicy_method("gkd", TOK, teacher, max_new_tokens=4)
    finite(train(student(), method, rows, STEPS))


def test_19_minillm_is_trained_by_the_same_loop(teacher):
    config = MiniLLMConfig(pt_weight=0.0, max_new_tokens=4)
    finite(train(student(), MiniLLM(TOK, teacher, config), PAIRS, STEPS))
    with pytest.raises(UserError, match="Pass a corpus, or set pt_weight=0"):
        MiniLLM(TOK, teacher)


# --- the product ----------------------------------------------------------------------------------------------------------------------

QUICK = {"max_steps": 2, "batch_size": 2, "validation": 2, "evaluations": 1, "device": "cpu"}


def test_17_distill_takes_rows_and_models(tmp_path, teacher):
    model = student()
    before = model.lm_head.weight.detach().clone()
    report = distill(
        data=PAIRS, teacher=teacher, student=model, tokenizer=TOK, out=tmp_path / "a", **QUICK
    )
    assert report["data"] == "rows" and (tmp_path / "a" / "model.safetensors").is_file()
    assert torch.equal(before, model.lm_head.weight), "the caller's student stays as it was"
    again = distill(
        data=PAIRS, teacher=(teacher, TOK), student=(model, TOK), out=tmp_path / "a", **QUICK
    )
    assert again == report
    with pytest.raises(UserError, match="tokenizer"):
        distill(data=PAIRS, teacher=teacher, student=model, out=tmp_path / "b", **QUICK)
    with pytest.raises(UserError, match="cannot be a int"):
        distill(data=PAIRS, teacher=3, student="layers:1", out=tmp_path / "b", **QUICK)
    with pytest.raises(UserError, match="another data_sha256"):
        distill(PAIRS[1:], (teacher, TOK), (model, TOK), out=tmp_path / "a", **QUICK)


@pytest.mark.parametrize(
    "objective", ["gkd", "minillm", "minillm_official", "distillm", "distillm2", "dpkd", "akl"]
)
def test_18_any_method_by_its_name(objective, tmp_path, teacher):
    "One product for all methods: the same rows, curve and card."
    quick = QUICK | {"max_new_tokens": 4}
    report = distill(PAIRS, (teacher, TOK), "layers:1", objective, tmp_path / "a", **quick)
    assert report["objective"] == {"akl": "adaptive_kl"}.get(objective, objective)
    assert (
        report["results"]["student"]["reverse_kl"] != report["results"]["untrained"]["reverse_kl"]
    )
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"model.safetensors", "README.md", "curves.png", "report.json"} <= files
    assert distill(PAIRS, (teacher, TOK), "layers:1", objective, tmp_path / "a", **quick) == report


def test_a_corpus_is_read_by_the_methods_that_have_a_term_for_it(tmp_path, teacher):
    quick = QUICK | {"max_new_tokens": 4}
    pair = ((teacher, TOK), "layers:1")
    (tmp_path / "texts.txt").write_text("one text of two\nlines\n\nanother text\n")
    with_corpus = {"corpus": tmp_path / "texts.txt"}
    report = distill(PAIRS, *pair, "minillm", tmp_path / "a", **with_corpus, **quick)
    plain = distill(PAIRS, *pair, "minillm", tmp_path / "b", **quick)
    assert report["corpus_sha256"] and report["results"]["student"] != plain["results"]["student"]
    with pytest.raises(UserError, match="another corpus_sha256"):
        distill(PAIRS, *pair, "minillm", tmp_path / "a", **quick)
    with pytest.raises(UserError, match="reads no corpus"):
        distill(PAIRS, *pair, "forward_kl", tmp_path / "c", **with_corpus, **quick)
    (tmp_path / "rows.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(UserError, match="text 1 is no text"):
        distill(PAIRS, *pair, "minillm", tmp_path / "c", corpus=tmp_path / "rows.jsonl", **quick)


def test_an_option_that_a_method_has_not_is_named_before_anything_is_loaded(tmp_path, teacher):
    for objective, options in (("gkd", {"beta": 0.5}), ("minillm", {"lambda": 1})):
        with pytest.raises(UserError, match="a setting does not exist"):
            distill(PAIRS, "none", "layers:1", objective, tmp_path / "a", options=options)
    assert not (tmp_path / "a").exists()


# --- step by step, caches, hidden states ----------------------------------------------------------------------------------------------


def test_20_step_rows_from_plain_rows():
    rows = [{"id": "a", "input": "2 + 2", "label": "4", "rationale": "two and two"}]
    (made,) = step_rows(rows)
    assert [term for term, _, _ in made.pairs] == ["label", "rationale"]
    bare = step_rows([{"input": "2 + 2", "label": "4"}])[0]
    assert [term for term, _, _ in bare.pairs] == ["label"] and bare.id
    with pytest.raises(UserError, match="reads a text"):
        step_rows(CHATS["messages"])
    finite(train(student(), StepByStep(TOK), rows * 4, STEPS))


def test_21_a_cache_is_a_data_set(tmp_path, teacher):
    cache = write_cache(tmp_path, teacher, TOK, PAIRS, k=8)
    assert len(cache) == 8 and cache[0]["id"] == "0" and cache[-1]["id"] == "7"
    assert cache["3"]["prompt"] == cache[3]["prompt"]
    with pytest.raises(IndexError):
        cache[8]
    method = KD(TOK, LogitCache(tmp_path))
    batches = list(DataLoader(cache, batch_size=3, collate_fn=method.collate, num_workers=0))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 2]
    sums = sum(method.loss_sums(student(), batch)["kd"].item() for batch in batches)
    whole = method.collate([method.encode(row) for row in PAIRS])
    assert sums == pytest.approx(method.loss_sums(student(), whole)["kd"].item(), rel=1e-4)
    finite(train(student(), method, cache, STEPS))


def test_22_hidden_states_of_the_middle_for_a_fitnets_loss(teacher):
    class Hints(KD):
        def loss_sums(self, model, batch):
            (own,) = hidden_states(model, batch, [1])
            with torch.no_grad():
                (hint,) = hidden_states(self.signal.model, batch, [1])
            distance = (own - hint).square().mean(-1).sum()
            return {"kd": super().loss_sums(model, batch)["kd"] + distance}

    hints = Hints(TOK, teacher)
    batch = hints.collate([hints.encode(row) for row in PAIRS[:3]])
    model = student()
    last, first = hidden_states(model, batch, [-1, 0])
    assert last.shape == first.shape == (hints.token_counts(batch)["kd"], model.config.hidden_size)
    head = model.lm_head(last)  # the last states are those behind the final norm
    torch.testing.assert_close(head, target_logits(model, batch), rtol=1e-4, atol=1e-5)
    finite(train(model, hints, PAIRS, STEPS))


@pytest.mark.parametrize("signal", ["smollm2", None, 3, [1]])
def test_what_is_no_teacher_is_one_clear_error(signal):
    with pytest.raises(UserError, match="gives no teacher's distributions"):
        KD(TOK, signal)


def test_fused_and_plain_agree_in_value_and_gradient_for_every_signal(tmp_path, teacher):
    cache = write_cache(tmp_path, teacher, TOK, PAIRS, k=16)
    for signal in (teacher, cache):
        for sft_weight in (0.0, 0.4):
            results = []
            for fused in (False, True):
                model = student().double()
                method = KD(TOK, signal, sft_weight=sft_weight, fused=fused)
                batch = method.collate([method.encode(row) for row in PAIRS[:4]])
                sums = method.loss_sums(model, batch)
                total = sum(method.loss_weights[term] * value for term, value in sums.items())
                total.backward()
                results.append((total.detach(), model.lm_head.weight.grad))
            for plain, fast in zip(*results):
                torch.testing.assert_close(plain, fast, rtol=1e-5, atol=1e-6)


def test_fused_where_it_is_impossible_is_refused_and_by_default_avoided(teacher):
    from kd_notes import OtherTokenizer

    signal = OtherTokenizer(teacher, TOK)
    with pytest.raises(UserError, match="fused=False"):
        method = KD(TOK, signal, "uld", fused=True)
        method.loss_sums(student(), method.collate([method.encode(row) for row in PAIRS[:2]]))
    with pytest.raises(UserError, match="cannot compare two tokenizers"):
        KD(TOK, signal, "forward_kl")
    method = KD(TOK, signal, "spans_matched")
    encoded = {"prompt": [3, 4], "completion": [5, 1]}
    with pytest.raises(UserError, match="Pass the row's text"):
        method.encode(encoded)


# --- the lazy names -------------------------------------------------------------------------------------------------------------------


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_importing_the_package_is_fast_and_brings_no_torch():
    fresh("import kd_notes")  # compile it
    code = "import sys, time; s = time.process_time(); import kd_notes; print(time.process_time() - s, 'torch' in sys.modules)"
    seconds, torch_is_there = fresh(code).split()
    assert torch_is_there == "False" and float(seconds) < 0.2


def test_every_name_resolves_to_the_module_that_defines_it():
    from importlib import import_module

    assert 50 <= len(kd_notes.__all__) <= 90 and len(set(kd_notes.__all__)) == len(kd_notes.__all__)
    for name, module in kd_notes._HOMES.items():
        home = import_module(f"kd_notes.{module}")
        assert getattr(kd_notes, name) is getattr(home, name)
        lives_in = getattr(getattr(home, name), "__module__", home.__name__)
        assert lives_in == home.__name__, f"{name} only passes through {module}"
    assert set(kd_notes.__all__) <= set(dir(kd_notes))
    with pytest.raises(AttributeError, match="nonsense"):
        kd_notes.nonsense


def test_no_name_is_hidden_by_a_module_of_the_package():
    "`import kd_notes.x` would replace the function x by the module x."
    modules = {path.stem for path in (ROOT / "kd_notes").iterdir()}
    assert not modules & set(kd_notes.__all__)


def test_export_writes_nothing_but_the_version(tmp_path):
    from nbdev.config import update_version

    text = (ROOT / "kd_notes" / "__init__.py").read_text()
    (tmp_path / "__init__.py").write_text(text.replace(kd_notes.__version__, "0.0.0"))
    update_version(tmp_path)
    assert (tmp_path / "__init__.py").read_text() == text
    assert any(isinstance(n, ast.FunctionDef) and n.name == "__dir__" for n in ast.parse(text).body)
