"""Back ends: batched generation against one-by-one, a real server that is killed, replay."""

import copy
import json
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from helpers import sharper, TransformersServer
import kd_notes.generation.backends as backends_module
import kd_notes.generation.engine as engine_module
from kd_notes.generation.backends import (
    LocalBackend,
    open_backend,
    ReplayBackend,
    stored_completion,
)
from kd_notes.generation.completions import (
    Completion,
    completion_row,
    Decoding,
    manifest_path,
)
from kd_notes.generation.beam import beam
from kd_notes.generation.engine import DecodeRow, end_tokens
from kd_notes.generation.sampling import greedy, sample, Sampling
from kd_notes.training.setup import add_lora
from kd_notes.generation.server import OpenAIBackend
from kd_notes.generation.speculative import speculative
from kd_notes.core import append_jsonl, read_json, read_jsonl, UserError, write_json
from kd_notes.experiments.extraction import extract_rationales
from kd_notes.models.mini import mini_model, train_mini_tokenizer

torch.set_num_threads(1)
WORDS = "Ann has 12 apples and buys 30 more. How many apples are in the box, on the shelf or under the table?".split()
SHOTS = "Question: Ann has 2 apples and 3 pears. How many?\nAnswer: ( 2 + 3 )\n\n"


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_mini_tokenizer([" ".join(WORDS), SHOTS] * 20, 600, tmp_path_factory.mktemp("tok"))


def llama(tok, kv=2, context=512, seed=0):
    return sharper(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tok),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=kv,
                max_position_embeddings=context,
                tie_word_embeddings=False,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=2,
            )
        ),
        seed,
        4.0,
    )


@pytest.fixture(scope="module")
def model(tok):
    return llama(tok)


def prompts_of(count, seed=0, prefix="", longest=40):
    draw = random.Random(seed)
    return [
        (f"r{i}", prefix + " ".join(draw.choices(WORDS, k=draw.randint(1, longest))))
        for i in range(count)
    ]


def one_by_one(model, tok, requests, decoding):
    "Reference: a plain loop without cache, batch or padding. {id: (tokens, finish)}"
    out = {}
    for name, prompt in requests:
        ids, new, finish = tok(prompt).input_ids, [], "length"
        while len(new) < decoding.max_new_tokens:
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1]
            new.append(int(logits.argmax()))
            if new[-1] == tok.eos_token_id or any(
                s in tok.decode(new, skip_special_tokens=True) for s in decoding.stop
            ):
                finish = "stop"
                break
        text = tok.decode(new, skip_special_tokens=True)
        at = min([text.find(s) for s in decoding.stop if s in text], default=len(text))
        out[name] = (text[:at], len(new), finish)
    return out


def outcome(completions):
    completions = list(completions)
    done = {c.id: (c.text, c.completion_tokens, c.finish) for c in completions}
    assert len(done) == len(completions)
    return done


# ---------------------------------------------------------------- batched == one by one


@pytest.mark.parametrize("batch_size", [1, 3, 8, 256])
@pytest.mark.parametrize("prefix", ["", SHOTS])
def test_batches_give_what_one_prompt_at_a_time_gives(model, tok, batch_size, prefix, monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 100)  # several prefills join one batch
    requests, decoding = prompts_of(14, prefix=prefix), Decoding(30)
    reference = one_by_one(model, tok, requests, decoding)
    assert (
        outcome(LocalBackend(model, tok, batch_size=batch_size).generate(requests, decoding))
        == reference
    )
    assert (
        len({text for text, *_ in reference.values()}) > 7
    )  # otherwise the comparison would say little


SIZE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
ARCHITECTURES = {
    "gpt2": lambda v: GPT2LMHeadModel(
        GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=1)
    ),
    "qwen2": lambda v: Qwen2ForCausalLM(Qwen2Config(vocab_size=v, **SIZE)),
    "mistral, window of 16": lambda v: MistralForCausalLM(
        MistralConfig(vocab_size=v, sliding_window=16, head_dim=8, **SIZE)
    ),
    "gemma2, windows and soft caps": lambda v: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=v, sliding_window=16, head_dim=8, **SIZE)
    ),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_other_architectures(tok, kind):
    model = sharper(ARCHITECTURES[kind](len(tok)), scale=2.0)
    requests, decoding = prompts_of(9, prefix=SHOTS), Decoding(12)
    backend = LocalBackend(model, tok, batch_size=4)
    assert outcome(backend.generate(requests, decoding)) == one_by_one(
        model, tok, requests, decoding
    )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=9),
    batch_size=st.integers(1, 6),
    new=st.integers(1, 14),
    seed=st.integers(0, 5),
    stop=st.sampled_from([(), ("e",), ("a", "th")]),
    spare=st.sampled_from([1, 64]),
)
def test_any_mixture_of_lengths(tok, lengths, batch_size, new, seed, stop, spare):
    model = llama(tok, seed=seed)
    draw = random.Random(seed)
    requests = [(f"r{i}", " ".join(draw.choices(WORDS, k=n))) for i, n in enumerate(lengths)]
    decoding, before = Decoding(new, stop=stop), engine_module.SPARE
    try:
        engine_module.SPARE = spare  # with one spare column the cache grows at nearly every step
        got = outcome(
            LocalBackend(model, tok, revision="x", batch_size=batch_size).generate(
                requests, decoding
            )
        )
    finally:
        engine_module.SPARE = before
    assert got == one_by_one(model, tok, requests, decoding)


def test_smollm2_in_a_batch_and_alone():
    backend = open_backend("smollm2", batch_size=4)
    requests = [
        (f"r{i}", f"Question: {q}?\nAnswer:")
        for i, q in enumerate(
            [
                "What is the capital of France",
                "Who wrote Hamlet",
                "How many legs do a spider and a dog have together",
                "Is ice cold",
                "Where would you look for a lamp if it is dark and you have no candle",
            ]
        )
    ]
    decoding = Decoding(6, stop=("\n\n",))
    assert outcome(backend.generate(requests, decoding)) == one_by_one(
        backend.model, backend.tokenizer, requests, decoding
    )
    assert backend.describe()["revision"] and backend.describe()["dtype"] == "float32"


# ---------------------------------------------------------------- what the speed comes from


class Fed:
    "Counts what a model is fed: tokens, and rows of one-token steps."

    def __init__(self, model):
        self.tokens, self.steps, self.head_rows = 0, [], 0
        self.hooks = [
            model.get_input_embeddings().register_forward_pre_hook(self.count),
            model.get_output_embeddings().register_forward_pre_hook(self.head),
        ]

    def count(self, module, args):
        self.tokens += args[0].numel()
        if args[0].shape[1] == 1:
            self.steps.append(args[0].shape[0])

    def head(self, module, args):
        self.head_rows += args[0].numel() // args[0].shape[-1]
        assert args[
            0
        ].is_contiguous()  # a strided input makes torch copy the head's weights for every row

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for hook in self.hooks:
            hook.remove()


def test_the_shared_prefix_is_fed_once_and_the_head_sees_last_positions_only(model, tok):
    requests = [(f"r{i}", SHOTS + f"Question: {i} apples.") for i in range(10)]
    prefix, whole = len(tok(SHOTS).input_ids), sum(len(tok(p).input_ids) for _, p in requests)
    with Fed(model) as fed:
        done = list(LocalBackend(model, tok, revision="x").generate(requests, Decoding(1)))
    assert len(done) == 10
    assert prefix <= fed.tokens <= whole - 9 * prefix + 20  # a little padding
    assert fed.head_rows == 11  # one for the prefix, one for each row


def test_finished_rows_leave_and_waiting_ones_take_their_place(model, tok):
    requests, decoding = prompts_of(40, seed=3), Decoding(60, stop=("e", "a"))
    lengths = [n for _, n, _ in one_by_one(model, tok, requests, decoding).values()]
    assert max(lengths) > 3 * sorted(lengths)[20]  # some rows run much longer than most
    with Fed(model) as fed:
        list(LocalBackend(model, tok, revision="x", batch_size=8).generate(requests, decoding))
    useful = sum(lengths) - len(lengths)  # the first token of each row comes from its prefill
    naive = sum(max(lengths[i : i + 8]) * 8 for i in range(0, 40, 8))
    assert useful <= sum(fed.steps) < 0.6 * naive
    assert max(fed.steps) <= 8


def test_the_batch_shrinks_where_the_cache_would_not_fit(model, tok):
    requests, decoding = prompts_of(12), Decoding(10)
    small = LocalBackend(model, tok, revision="x", cache_gib=0.00012)
    with Fed(model) as fed:
        got = outcome(small.generate(requests, decoding))
    assert 1 <= max(fed.steps) <= 6
    assert got == outcome(LocalBackend(model, tok, revision="x").generate(requests, decoding))


# ---------------------------------------------------------------- ends


def test_stop_texts_that_spread_over_tokens(model, tok):
    requests = prompts_of(12, seed=5)
    free = {
        name: text for name, (text, *_) in one_by_one(model, tok, requests, Decoding(40)).items()
    }
    stops = tuple(sorted({t[i : i + 5] for t in free.values() for i in (7, 19) if len(t) > 26}))[:6]
    got = outcome(LocalBackend(model, tok).generate(requests, Decoding(40, stop=stops)))
    assert got == one_by_one(model, tok, requests, Decoding(40, stop=stops))
    assert sum(finish == "stop" for *_, finish in got.values()) >= len(stops)
    assert not any(s in text for text, *_ in got.values() for s in stops)
    assert all(free[name].startswith(text) for name, (text, *_) in got.items())


def test_the_end_mark_ends_a_row_and_is_not_in_the_text(model, tok):
    requests, backend = prompts_of(8, seed=1), LocalBackend(model, tok)
    made = {
        name: model.generate(torch.tensor([tok(p).input_ids]), max_new_tokens=9, do_sample=False)[
            0, len(tok(p).input_ids) :
        ].tolist()
        for name, p in requests
    }
    mark = Counter(t for row in made.values() for t in row[2:]).most_common(1)[0][0]
    backend.ends = {mark}
    for c in backend.generate(requests, Decoding(9)):
        row = made[c.id]
        assert c.completion_tokens == (row.index(mark) + 1 if mark in row else 9)
        assert c.finish == ("stop" if mark in row else "length")


def test_special_tokens_are_not_in_the_text(model, tok):
    backend, requests = LocalBackend(model, tok), prompts_of(8, seed=1)
    first = {
        name: int(model(torch.tensor([tok(p).input_ids])).logits[0, -1].argmax())
        for name, p in requests
    }
    with torch.no_grad():
        shifted = llama(tok)
        shifted.lm_head.weight[tok.eos_token_id] = (
            shifted.lm_head.weight[first["r0"]] * 3
        )  # the end mark wins where r0's first token did
    done = {c.id: c for c in LocalBackend(shifted, tok).generate(requests, Decoding(9))}
    assert (done["r0"].text, done["r0"].completion_tokens, done["r0"].finish) == ("", 1, "stop")
    assert backend.ends == {tok.eos_token_id} and not any(
        tok.eos_token in c.text for c in done.values()
    )


def test_log_probability_is_that_of_the_tokens(model, tok):
    requests = prompts_of(3)
    for c in LocalBackend(model, tok, logprobs=True).generate(requests, Decoding(5)):
        ids, total = tok(dict(requests)[c.id]).input_ids, 0.0
        for _ in range(c.completion_tokens):
            logp = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids, total = ids + [int(logp.argmax())], total + float(logp.max())
        assert c.logprob == pytest.approx(total, abs=1e-3)
    assert next(LocalBackend(model, tok).generate(requests, Decoding(1))).logprob is None


def test_seconds_add_up_to_the_time_that_passed(model, tok):
    start = time.perf_counter()
    done = list(
        LocalBackend(model, tok, revision="x", batch_size=4).generate(prompts_of(10), Decoding(10))
    )
    passed = time.perf_counter() - start
    assert 0.2 * passed < sum(c.seconds for c in done) <= passed + 0.01


# ---------------------------------------------------------------- sampling


def texts(completions):
    return {(c.id, c.sample): c.text for c in completions}


def test_a_sample_does_not_depend_on_its_company(model, tok):
    requests, decoding = prompts_of(10), Decoding(12, temperature=1.0, n=3, seed=7)
    together = texts(LocalBackend(model, tok).generate(requests, decoding))
    assert len(together) == 30 and len({together["r0", k] for k in range(3)}) == 3
    backward = texts(LocalBackend(model, tok, batch_size=2).generate(requests[::-1], decoding))
    assert backward == together
    alone = texts(LocalBackend(model, tok, batch_size=1).generate(requests[4:5], decoding))
    assert alone == {k: v for k, v in together.items() if k[0] == "r4"}
    assert (
        texts(
            LocalBackend(model, tok).generate(requests, Decoding(12, temperature=1.0, n=3, seed=8))
        )
        != together
    )


@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 8, "top_p": 0.8}])
def test_samples_follow_the_distribution(limits):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 1.5
    decoding, n = Decoding(1, temperature=1.3, **limits), 6000
    rows = [
        engine_module.DecodeRow(str(i), 0, [], draws=engine_module.draws(0, str(i), 0, 1))
        for i in range(n)
    ]
    drawn = (
        torch.bincount(
            engine_module.next_tokens(
                engine_module.Scores(logits.expand(n, 20), None), rows, decoding
            ),
            minlength=20,
        )
        / n
    )
    p = torch.softmax(logits / 1.3, -1)  # the same limits, written the plain way
    order = p.argsort(descending=True)
    if "top_k" in limits:
        p[order[limits["top_k"] :]] = 0
    p /= p.sum()
    mass = 0.0
    for i in order:
        mass, p[i] = mass + float(p[i]), p[i] if mass < limits.get("top_p", 1.1) else 0.0
    p /= p.sum()
    assert (drawn[p == 0] == 0).all()
    assert (drawn - p).abs().max() < 4.5 * 0.5 / n**0.5


def test_top_p_is_exact_when_it_needs_more_than_the_first_thousand():
    flat = torch.zeros(2, 3000)
    weights, ids = engine_module.truncate(torch.softmax(flat, -1), top_p=0.9)
    assert weights.shape[-1] == 3000 and abs(int((weights[0] > 0).sum()) - 2700) <= 2


def test_low_temperature_approaches_greedy(model, tok):
    requests = prompts_of(6)
    cold = texts(LocalBackend(model, tok).generate(requests, Decoding(10, temperature=1e-3)))
    assert cold == texts(LocalBackend(model, tok).generate(requests, Decoding(10)))


def test_a_head_with_an_adapter_is_read_with_it_in_half_precision(tok):
    base = mini_model("causal", "xs", len(tok), 0).bfloat16()
    adapted = add_lora(base, {"r": 8, "targets": ["lm_head"]}, 0).eval()
    draw = torch.Generator().manual_seed(0)
    layer = adapted.get_output_embeddings()
    with torch.no_grad():  # a fresh adapter changes nothing
        layer.lora_B["default"].weight.normal_(0, 0.5, generator=draw)
    prompts = [[2, *range(5, 9 + k)] for k in range(12)]
    found, wanted = greedy(adapted, prompts, 4).response_ids, []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(adapted(torch.tensor([ids])).logits[0, -1].float().argmax()))
        wanted.append(ids[len(prompt) :])
    assert found == wanted
    with adapted.disable_adapter():
        assert found != greedy(adapted, prompts, 4).response_ids


def test_half_precision_decides_near_ties_in_float32(tok):
    model = llama(tok).bfloat16()
    requests, decoding, new = prompts_of(12), Decoding(8), {}
    backend = LocalBackend(model, tok)
    for name, prompt in requests:  # the same weights and states, but the head in float64
        ids, made = tok(prompt).input_ids, []
        for _ in range(8):
            hidden = model.model(torch.tensor([ids + made])).last_hidden_state[0, -1]
            made.append(int((model.lm_head.weight.double() @ hidden.double()).argmax()))
            if made[-1] == tok.eos_token_id:
                break
        new[name] = tok.decode(made, skip_special_tokens=True)
    one_at_a_time = LocalBackend(model, tok, batch_size=1)
    got = [outcome(b.generate(requests, decoding)) for b in (one_at_a_time, backend)]
    same = [sum(g[name][0] == text for name, text in new.items()) for g in got]
    assert (
        same[0] >= 10 and same[1] >= 8
    )  # the states themselves are in bfloat16 and differ a little with the cache and the batch


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_generated_is_refused_with_its_name(model, tok):
    backend = LocalBackend(model, tok, revision="x")
    with pytest.raises(UserError, match="request long.*context of 512"):
        backend.generate([("short", "a"), ("long", "apples " * 500)], Decoding(30))
    with pytest.raises(UserError, match="'a' occurs 2 times"):
        backend.generate([("a", "x"), ("a", "y")], Decoding(3))
    with pytest.raises(UserError, match="prompt is empty"):
        backend.generate([("a", "")], Decoding(3))
    assert list(backend.generate([], Decoding(3))) == []
    with pytest.raises(UserError, match="encoder and a decoder"):
        LocalBackend(mini_model("t5", "xs", len(tok), 0), tok)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(max_new_tokens=0),
        dict(temperature=-1.0),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(top_k=-1),
        dict(n=0),
        dict(n=2),
        dict(stop=("",)),
    ],
)
def test_impossible_decoding_is_refused(wrong):
    with pytest.raises(UserError, match=f"decoding parameter {next(iter(wrong))}"):
        Decoding(**({"max_new_tokens": 3} | wrong))


@pytest.mark.parametrize(
    "spec", ["gpt5", "", "openai:127.0.0.1:80#m", "openai:http://h/v1", "hub", "smollm3+x"]
)
def test_an_unknown_spec_lists_the_forms(spec):
    with pytest.raises(UserError, match="openai:"):
        open_backend(spec)


def test_a_folder_is_a_spec_and_its_revision_is_its_weights(model, tok, tmp_path):
    for name, m in [("one", model), ("two", llama(tok, seed=1))]:
        m.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    one, two, again = (open_backend(tmp_path / n) for n in ("one", "two", "one"))
    assert one.describe() == again.describe() != two.describe()
    assert one.describe()["model"] == "one" and str(tmp_path) not in json.dumps(one.describe())
    requests = prompts_of(4)
    assert outcome(one.generate(requests, Decoding(6))) == outcome(
        LocalBackend(model, tok).generate(requests, Decoding(6))
    )
    assert open_backend(tmp_path / "one", dtype="bfloat16").describe()["dtype"] == "bfloat16"


def test_an_adapter_is_merged_and_named_by_its_checksum(model, tok, tmp_path):
    from peft import LoraConfig, get_peft_model

    (tmp_path / "base").mkdir()
    model.save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(
        llama(tok),
        LoraConfig(
            r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        ),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    plain, tuned = (
        open_backend(tmp_path / "base"),
        open_backend(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"),
    )
    requests = prompts_of(6)
    got = outcome(tuned.generate(requests, Decoding(8)))
    assert got == outcome(
        LocalBackend(adapted.merge_and_unload(), tok).generate(requests, Decoding(8))
    )
    assert got != outcome(plain.generate(requests, Decoding(8)))
    assert len(tuned.describe()["adapter"]) == 16 and plain.describe()["adapter"] == ""
    with pytest.raises(UserError, match="adapter"):
        open_backend(f"{tmp_path / 'base'}+{tmp_path / 'base'}")


def test_a_chat_template_is_applied_on_request(model, tok):
    tok.chat_template = "{% for m in messages %}Question: {{ m.content }}\nAnswer:{% endfor %}"
    try:
        wrapped = texts(
            LocalBackend(model, tok, chat=True).generate([("a", "How many?")], Decoding(8))
        )
    finally:
        tok.chat_template = None
    assert wrapped == texts(
        LocalBackend(model, tok).generate([("a", "Question: How many?\nAnswer:")], Decoding(8))
    )


# ---------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def folder(model, tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(settings | {"do_sample": True})
    )  # without it this server never samples
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}Question: {{ m.content }}\nAnswer:{% endfor %}"
    )
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = TransformersServer(folder).ready()
    yield server
    server.kill()


def test_a_server_gives_the_same_texts_as_the_model_here(server, model, tok):
    requests, decoding = prompts_of(10, prefix=SHOTS), Decoding(12, stop=("th", "\n\n"))
    remote = open_backend(f"openai:{server.url}#{server.folder}", concurrency=3)
    done = list(remote.generate(requests, decoding))
    local = outcome(LocalBackend(model, tok).generate(requests, decoding))
    assert {c.id: c.text for c in done} == {name: text for name, (text, *_) in local.items()}
    assert all(
        c.prompt_tokens == len(tok(dict(requests)[c.id]).input_ids) and c.seconds > 0 for c in done
    )
    assert {c.finish for c in done} == {"stop", "length"} == {f for *_, f in local.values()}


def test_chat_and_sampling_on_a_server(server):
    chat = open_backend(f"openai-chat:{server.url}#{server.folder}", concurrency=1)
    requests = [("a", "How many?")]
    plain = OpenAIBackend(server.url, server.folder)
    assert texts(chat.generate(requests, Decoding(8))) == texts(
        plain.generate([("a", "Question: How many?\nAnswer:")], Decoding(8))
    )
    one = OpenAIBackend(
        server.url, server.folder, concurrency=1
    )  # this server seeds the whole process: one at a time
    samples = texts(one.generate(requests, Decoding(10, temperature=1.0, n=3, seed=1)))
    assert len(samples) == len(set(samples.values())) == 3
    assert samples == texts(one.generate(requests, Decoding(10, temperature=1.0, n=3, seed=1)))


def test_what_a_server_refuses_is_not_tried_again(server):
    remote, start = (
        OpenAIBackend(server.url, server.folder, retries=5),
        time.monotonic(),
    )
    with pytest.raises(
        UserError, match=r"refused.*HTTP 422|refused.*top_k"
    ):  # transformers serve knows no top_k
        list(remote.generate(prompts_of(1), Decoding(4, temperature=1.0, top_k=5)))
    wrong = OpenAIBackend(server.url + "/nowhere", server.folder, retries=5)
    with pytest.raises(UserError, match=r"refused.*404.*/v1.*models"):
        list(wrong.generate(prompts_of(1), Decoding(4)))
    assert time.monotonic() - start < 15


def test_a_server_killed_in_the_middle_keeps_what_it_answered_and_is_waited_for(folder):
    requests, decoding = prompts_of(30), Decoding(4)
    server = TransformersServer(folder).ready()
    remote, first = (
        OpenAIBackend(server.url, server.folder, concurrency=2, retries=2, timeout=30),
        [],
    )
    with pytest.raises(
        UserError, match=f"127.0.0.1:{server.port}/v1, request r.*3 attempts.*[Ss]erver runs"
    ):
        for c in remote.generate(requests, decoding):
            first.append(c)
            if len(first) == 5:
                server.kill()
    assert 5 <= len(first) < 30
    rest = [r for r in requests if r[0] not in {c.id for c in first}]
    patient = OpenAIBackend(server.url, server.folder, concurrency=2, retries=50, timeout=30)
    collected = []
    thread = threading.Thread(target=lambda: collected.extend(patient.generate(rest, decoding)))
    thread.start()  # while there is no server
    again = TransformersServer(folder, server.port).ready()
    thread.join(120)
    again.kill()
    assert Counter(c.id for c in first + collected) == Counter(name for name, _ in requests)


# ---------------------------------------------------------------- a server of our own, for moods that a good one does not have


class Moody(BaseHTTPRequestHandler):
    "Plays `server.script`: (status, headers, body) per request, then completions that repeat the prompt's last word."

    def do_POST(self):
        s = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with s.lock:
            s.seen.append((time.monotonic(), self.headers.get("Authorization"), asked))
            s.busy += 1
            s.most = max(s.most, s.busy)
            status, headers, body = s.script.pop(0) if s.script else (200, {}, self.complete(asked))
        time.sleep(s.delay)
        with s.lock:
            s.busy -= 1
        self.send_response(status)
        for key, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
        ).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def complete(self, asked):
        return json.dumps(
            {
                "id": "1",
                "object": "text_completion",
                "created": 0,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "text": asked["prompt"].split()[-1],
                        "finish_reason": "stop",
                        "logprobs": None,
                    }
                ],
            }
        )

    def log_message(self, *args):
        pass


@pytest.fixture
def moody():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    server.script, server.seen, server.busy, server.most, server.delay, server.lock = (
        [],
        [],
        0,
        0,
        0.0,
        threading.Lock(),
    )
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_busy_servers_are_given_the_time_they_ask_for(moody):
    moody.script[:] = [
        (429, {"Retry-After": "0.6"}, '{"error": {"message": "slow down"}}'),
        (500, {}, "{}"),
    ]
    done = list(OpenAIBackend(moody.url, "m").generate([("a", "one two")], Decoding(3)))
    assert [c.text for c in done] == ["two"]
    first, second, third = [t for t, *_ in moody.seen]
    assert second - first >= 0.6 and third - second < 3  # the second wait is the client's


@pytest.mark.parametrize(
    "garbage",
    [
        (200, {"Content-Type": "text/html"}, "<html>Be right back</html>"),
        (200, {}, "{not json"),
        (200, {}, "[]"),
        (200, {}, '{"choices": []}'),
        (200, {}, '{"choices": [{"text": null}]}'),
        (200, {}, '{"choices": [7]}'),
        (200, {}, '"hello"'),
    ],
)
def test_garbage_is_tried_again_and_then_named(moody, garbage):
    remote = OpenAIBackend(moody.url, "m", retries=1)
    moody.script[:] = [garbage]
    assert [c.text for c in remote.generate([("a", "one two")], Decoding(3))] == ["two"]
    moody.script[:] = [garbage] * 2
    (unanswered,) = remote.generate([("a", "one two")], Decoding(3))  # others were answered
    assert (unanswered.finish, unanswered.text) == ("unanswered", "") and unanswered.error
    moody.script[:] = [garbage] * 2
    remote = OpenAIBackend(moody.url, "m", retries=1)
    with pytest.raises(UserError, match="no usable answer in 2 attempts") as e:
        list(remote.generate([("a", "one two")], Decoding(3)))
    assert moody.url in str(e.value) and "request a" in str(e.value)


def test_concurrency_and_requests_per_minute_are_kept(moody):
    moody.delay = 0.05
    list(OpenAIBackend(moody.url, "m", concurrency=3).generate(prompts_of(12), Decoding(3)))
    assert moody.most == 3
    moody.seen.clear()
    list(
        OpenAIBackend(moody.url, "m", concurrency=8, requests_per_minute=600).generate(
            prompts_of(8), Decoding(3)
        )
    )
    times = [t for t, *_ in moody.seen]
    assert times[-1] - times[0] > 0.6  # seven gaps of 0.1 s, give or take the start of a thread


def test_the_key_is_sent_and_appears_nowhere_else(moody, monkeypatch, capfd, tmp_path, caplog):
    key = "sk-0123456789-secret"
    monkeypatch.setenv("MY_KEY", key)
    remote = OpenAIBackend(moody.url, "m", key_env="MY_KEY", retries=0)
    done = list(remote.generate([("a", "one two")], Decoding(3)))
    assert moody.seen[0][1] == f"Bearer {key}"
    append_jsonl(tmp_path / "out.jsonl", [completion_row(c, "one two") for c in done])
    errors = []
    for status in (401, 429, 500):
        moody.script[:] = [
            (status, {}, json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}}))
        ]
        other = OpenAIBackend(moody.url, "m", key_env="MY_KEY", retries=0)
        with pytest.raises(UserError) as e:
            list(other.generate([("a", "one two")], Decoding(3)))
        errors.append(str(e.value))
    moody.script[:] = [(500, {}, json.dumps({"error": {"message": f"wrong key: {key}"}}))]
    (unanswered,) = remote.generate([("a", "one two")], Decoding(3))
    errors.append(unanswered.error)
    assert "***" in errors[-1]
    assert "MY_KEY" in errors[0] and "***" in errors[0]
    out = capfd.readouterr()
    shown = [
        *errors,
        repr(remote),
        str(remote.describe()),
        str(vars(remote)),
        (tmp_path / "out.jsonl").read_text(),
        out.out,
        out.err,
        caplog.text,
    ]
    assert not any(key in text for text in shown)


def test_leaving_early_stops_asking(moody):
    moody.delay = 0.05
    answers = OpenAIBackend(moody.url, "m", concurrency=2).generate(prompts_of(50), Decoding(3))
    next(answers)
    answers.close()
    time.sleep(0.3)
    asked = len(moody.seen)
    time.sleep(0.3)
    assert len(moody.seen) == asked < 10


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80/v1", "ftp://h/v1", "http://", "https://me:secret@h/v1"]
)
def test_urls_that_cannot_be_and_urls_with_secrets_are_refused(url):
    with pytest.raises(UserError, match="base_url") as e:
        OpenAIBackend(url, "m")
    assert "secret" not in str(e.value)


# ---------------------------------------------------------------- replay


def stored(tmp_path, model, tok, decoding=None):
    requests, decoding = prompts_of(5), decoding or Decoding(6)
    done = list(LocalBackend(model, tok).generate(requests, decoding))
    append_jsonl(tmp_path / "a.jsonl", [completion_row(c, dict(requests)[c.id]) for c in done])
    return requests, done


def test_replay_gives_back_what_was_stored_whatever_the_order(model, tok, tmp_path):
    decoding = Decoding(6, temperature=1.0, n=2)
    requests, done = stored(tmp_path, model, tok, decoding)
    again = list(open_backend(f"replay:{tmp_path / 'a.jsonl'}").generate(requests[::-1], decoding))
    assert {(c.id, c.sample): c for c in again} == {(c.id, c.sample): c for c in done} and len(
        again
    ) == 10
    part = list(ReplayBackend(tmp_path / "a.jsonl").generate(requests[2:3], decoding))
    assert {c.id for c in part} == {"r2"}


def test_replay_refuses_another_prompt_an_unknown_id_and_other_decoding(model, tok, tmp_path):
    requests, _ = stored(tmp_path, model, tok)
    replay = ReplayBackend(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="a.jsonl.*'r1' belongs to another prompt"):
        replay.generate([requests[0], ("r1", requests[1][1] + " ")], Decoding(6))
    with pytest.raises(UserError, match="no answer for the id 'r77'"):
        replay.generate([("r77", "x")], Decoding(6))
    with pytest.raises(UserError, match=r"'r0' \(sample 1\)"):
        replay.generate(requests[:1], Decoding(6, temperature=1.0, n=2))
    write_json(
        manifest_path(tmp_path / "a.jsonl"),
        {"backend": {"model": "tiny", "revision": "abc"}, "decoding": Decoding(6)},
    )
    replay = ReplayBackend(tmp_path / "a.jsonl")
    assert (replay.name, replay.revision) == ("tiny", "abc") and replay.describe()[
        "kind"
    ] == "replay"
    with pytest.raises(UserError, match=r"max_new_tokens 6 \(asked for: 7\)"):
        replay.generate(requests, Decoding(7))
    assert len(list(replay.generate(requests, Decoding(6)))) == 5


@pytest.mark.parametrize(
    "row, what",
    [
        ({"id": "r0", "text": "again", "prompt_hash": "0", "finish": "stop"}, "occurs twice"),
        ({"id": "r9", "text": "x"}, "missing"),
    ],
)
def test_replay_refuses_a_damaged_file(model, tok, tmp_path, row, what):
    stored(tmp_path, model, tok)
    append_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=f"a.jsonl, row 6.*{what}"):
        ReplayBackend(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="nothing.jsonl"):
        ReplayBackend(tmp_path / "nothing.jsonl")


def test_a_completion_survives_its_row():
    for c in [
        Completion("a", "so", 3, 2, "stop", 0.5),
        Completion("b", "é\n", 3, 2, "length", 0.5, -1.5, 4),
    ]:
        assert stored_completion(json.loads(json.dumps(completion_row(c, "p")))) == c


# ---------------------------------------------------------------- all end tokens


class Talker(LlamaForCausalLM):
    "Says X, then the token that ends a turn, then Y for ever."

    says: dict[int, int] = {}
    first = 0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        after = [self.says.get(t, self.first) for t in kwargs["input_ids"][:, -1].tolist()]
        spoken = torch.tensor(after)[:, None, None].expand(-1, out.logits.shape[1], 1)
        out.logits = torch.full_like(out.logits, -20.0).scatter(-1, spoken, 20.0)
        return out


@pytest.mark.parametrize("form", ["list", "int", "tokenizer"])
def test_every_end_token_ends_a_text_in_every_sampler(tok, form):
    x, turn_end, y = (tok.convert_tokens_to_ids(t) for t in ("x", "z", "y"))
    model = Talker(llama(tok).config).eval()
    model.says, model.first = {x: turn_end, turn_end: y, y: y}, x
    ids = {"list": [tok.eos_token_id, turn_end], "int": turn_end, "tokenizer": None}[form]
    model.generation_config.eos_token_id = ids
    if form == "tokenizer":
        model.config.eos_token_id = turn_end
    ends = end_tokens(model, tok)
    assert ends == tuple(sorted({tok.eos_token_id, turn_end}))
    prompt = tok("Ann has").input_ids
    for rollout in (
        greedy(model, [prompt], 6, ends),
        sample(model, [prompt], Sampling(6, stop_ids=ends)),
        beam(model, [prompt], 2, 6, ends),
        speculative(model, model, [prompt], Sampling(6, stop_ids=ends)),
    ):
        assert rollout.response_ids == [[x, turn_end]] and rollout.finished == [True]
    (completion,) = LocalBackend(model, tok).generate([("a", "Ann has")], Decoding(6))
    assert completion.finish == "stop" and completion.completion_tokens == 2


def test_a_chat_template_that_opens_the_thoughts_is_not_stopped_inside_them(tok):
    tok = copy.deepcopy(tok)
    tok.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    backend = LocalBackend(llama(tok), tok, chat=True)
    assert backend.opening == "<think>"
    ending = backends_module._Endings(backend, Decoding(9, stop=("\n\n",)))
    thinking = DecodeRow("a", 0, [1], tok("So.\n\nOr not.").input_ids)
    done = DecodeRow("a", 0, [1], tok("So.\n\nOr not.</think>\n\nTwelve.\n\nNext").input_ids)
    assert ending.text(thinking) == ("", False) and ending.text(done) == ("Twelve.", True)


# --- the same teacher ---------------------------------------------------------------------------------------------------------------


def asked(spec, path, limit, **more):
    "Let a teacher answer the first rows of a task into a file, which a second call resumes."
    (path.parent / "free.toml").write_text('name = "free"\nlabels = "text"\n')
    rows = [{"id": f"r{i}", "input": f"The cat {i}", "label": "a"} for i in range(4)]
    source = path.parent / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"source": source, "teacher": str(spec), "limit": limit, "max_new_tokens": 4}
    return extract_rationales(path.parent / "free.toml", path, **how, **more)


CHANGES = {
    "config.json": lambda c: c | {"rms_norm_eps": 0.5},
    "generation_config.json": lambda c: c | {"eos_token_id": [1, 7]},
    "tokenizer_config.json": lambda c: c | {"chat_template": "{{ messages }}!"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_is_not_resumed_by_a_model_with_another_layout(tok, tmp_path, name):
    mini_model("causal", "xs", len(tok), seed=0).save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    out = tmp_path / "out.jsonl"
    asked(tmp_path / "m", out, 2)
    assert asked(tmp_path / "m", out, 3)["rows"] == 3
    file = tmp_path / "m" / name
    file.write_text(json.dumps(CHANGES[name](json.loads(file.read_text()))))
    with pytest.raises(UserError, match="another job.*backend.layout"):
        asked(tmp_path / "m", out, 4)


def test_a_file_of_before_is_resumed_and_tells_the_layout_from_then_on(tok, tmp_path):
    mini_model("causal", "xs", len(tok), seed=0).save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    out = tmp_path / "out.jsonl"
    asked(tmp_path / "m", out, 2)
    manifest = manifest_path(out)
    old = read_json(manifest)
    layout = old["backend"].pop("layout")
    manifest.write_text(json.dumps(old))
    assert asked(tmp_path / "m", out, 3)["rows"] == 3
    assert read_json(manifest)["backend"]["layout"] == layout


class Served(BaseHTTPRequestHandler):
    "A server that says which model it is."

    model: str | None = "teacher-2024"

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "text": " So.\nAnswer: a\n", "finish_reason": "stop"}
        body = json.dumps({"choices": [choice]} | ({"model": self.model} if self.model else {}))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


@pytest.fixture
def served():
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Mine", (Served,), {}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.RequestHandlerClass, f"openai:http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("stream", [False, True])
def test_a_file_is_not_resumed_by_a_server_that_has_changed_its_model(served, tmp_path, stream):
    kind, url = served
    out = tmp_path / "out.jsonl"
    asked(f"{url}/v1#teacher", out, 2, stream=stream)
    assert [row["model"] for row in read_jsonl(out)] == ["teacher-2024"] * 2
    kind.model = "teacher-2025"
    with pytest.raises(UserError, match="teacher-2025; before it was teacher-2024.*--out"):
        asked(f"{url}/v1#teacher", out, 4, stream=stream)
    assert len(read_jsonl(out)) == 2
    kind.model = None  # it does not say
    assert asked(f"{url}/v1#teacher", out, 3, stream=stream)["rows"] == 3
    with pytest.raises(UserError, match="another job.*backend.path"):
        asked(f"{url}/deployments/b/v1#teacher", out, 4, stream=stream)


def test_a_file_without_a_servers_path_and_model_is_resumed(served, tmp_path):
    kind, url = served
    out = tmp_path / "out.jsonl"
    kind.model = None
    asked(f"{url}/v1#teacher", out, 2)
    old = read_json(manifest_path(out))
    assert old["backend"].pop("path") == "/v1"
    manifest_path(out).write_text(json.dumps(old))
    kind.model = "teacher-2025"
    assert asked(f"{url}/v1#teacher", out, 3)["rows"] == 3
