"""Teachers on a server, and several at once: parity with the local model over real HTTP, and what is refused."""

import json
import math

import pytest
import torch
from helpers import sharper
from token_server import TokenServer
from typer.testing import CliRunner

from kd_notes.cli import app
from kd_notes.core import read_json, UserError
from kd_notes.losses.divergences import forward_kl
from kd_notes.losses.sparse import keep_top_k
from kd_notes.methods.gkd import GKD, GKDConfig, Part
from kd_notes.methods.logit_cache import LogitCache, write_cache
from kd_notes.methods.logit_kd import KD
from kd_notes.methods.minillm import MiniLLM, MiniLLMConfig
from kd_notes.methods.rollouts import Response, response_batch, RolloutRow
from kd_notes.methods.server_teacher import open_server_teacher, tail_of
from kd_notes.methods.several_teachers import RoutedTeachers, TeacherMixture
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.models.pretrained import weights_hash
from kd_notes.products.distill import distill
from kd_notes.training.batches import causal_batch, target_logits
from kd_notes.training.loop import train
from kd_notes.training.state import TrainConfig

TOK = load_mini_tokenizer()
V = len(TOK)
WORDS = "river bread rain cloud early late water flour".split()
ROWS = [
    {
        "id": f"r{i}",
        "prompt": f"Say {WORDS[i]}:",
        "completion": f" {WORDS[-1 - i]}.",
        "domain": "law" if i % 2 else "art",
    }
    for i in range(8)
]
QUICK = {
    "max_steps": 2,
    "batch_size": 2,
    "validation": 2,
    "evaluations": 1,
    "device": "cpu",
    "max_new_tokens": 4,
}
LOCAL = QUICK
QUICK = QUICK | {"top_k": 8, "server": {"retries": 0}}
STEPS = TrainConfig(max_steps=3, batch_size=4, lr=1e-3, log_every=1, device="cpu")


def tiny(seed=0):
    return sharper(mini_model("causal", "xs", V, seed=seed), seed=seed, scale=1.0)


def student(seed=7):
    return mini_model("causal", "xs", V, seed=seed)


@pytest.fixture(scope="module")
def teacher():
    return tiny()


@pytest.fixture
def serve(teacher):
    servers = []

    def start(form="vllm", model=None, tokenizer=TOK, **options):
        servers.append(TokenServer(model or teacher, tokenizer, form, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def opened(server, top_k=8, temperature=1.0, tokenizer=TOK, **options):
    options = {"retries": 0, "timeout": 20.0} | options
    return open_server_teacher(server.spec, tokenizer, top_k, temperature, **options)


def contents(folder):
    return {row["id"]: row["targets"] for row in LogitCache(folder)}


def losses(signal, method, rows=ROWS):
    return [row["loss"] for row in train(student(), method(signal), rows, STEPS).history]


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("form, temperature", [("vllm", 1.0), ("llama", 1.0), ("llama", 2.0)])
def test_a_cache_from_a_server_is_that_of_the_local_model(
    serve, tmp_path, teacher, form, temperature
):
    server = serve(form)
    remote = opened(server, temperature=temperature)
    assert remote.server.form == form
    recipe = {"k": 8, "temperature": temperature, "dtype": "float32"}
    write_cache(tmp_path / "here", teacher, TOK, ROWS, **recipe)
    write_cache(tmp_path / "there", remote, TOK, ROWS, **recipe)
    here, there = contents(tmp_path / "here"), contents(tmp_path / "there")
    assert here.keys() == there.keys() and len(here) == 8
    for name, kept in here.items():
        assert torch.equal(kept["cache_ids"], there[name]["cache_ids"])
        for part in ("cache_log_probs", "cache_tail"):
            torch.testing.assert_close(there[name][part], kept[part], atol=1e-5, rtol=0)
    asked = len(server.calls)
    assert all(type(token) is int for call in server.calls for token in call["prompt"])
    write_cache(tmp_path / "there", remote, TOK, ROWS, **recipe)
    assert len(server.calls) == asked, "a finished cache is not asked for again"


@pytest.mark.parametrize("form", ["vllm", "llama"])
@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
def test_on_policy_losses_are_those_of_the_local_model(serve, teacher, form, tail):
    remote = opened(serve(form))

    def method(signal):
        parts = (Part("jsd", top_k=8, tail=tail, options={"beta": 0.5}),)
        config = GKDConfig(rollouts=4, max_new_tokens=4, share=0.5, coin="example", parts=parts)
        return GKD(TOK, signal, config)

    here, there = losses(teacher, method), losses(remote, method)
    assert here == pytest.approx(there, abs=1e-5) and here[0] > 0.01


def test_a_row_of_logits_from_a_server_is_a_distribution_with_the_known_parts(serve, teacher):
    batch = causal_batch([([5, 6], [9, 300, 12]), ([7], [8, 9])], 0)
    exact = target_logits(teacher, batch).log_softmax(-1)
    dense = target_logits(opened(serve()), batch)
    torch.testing.assert_close(dense.logsumexp(-1), torch.zeros(5), atol=1e-5, rtol=0)
    kept = keep_top_k(exact, 8)
    torch.testing.assert_close(keep_top_k(dense, 8)["log_probs"], kept["log_probs"])
    torch.testing.assert_close(keep_top_k(dense, 8)["tail"], kept["tail"], atol=1e-5, rtol=0)
    own = torch.tensor([9, 300, 12, 8, 9])[:, None]
    # vLLM tells the row's own tokens too, whatever their rank
    torch.testing.assert_close(dense.gather(1, own), exact.gather(1, own), atol=1e-4, rtol=0)


def test_the_tail_has_a_floor_and_a_sum_above_one_is_refused():
    sure = torch.tensor([[0.0, -30.0]])
    assert tail_of(sure, 10).item() == pytest.approx(math.log(1e-6))
    assert tail_of(sure, 2).item() == -math.inf
    with pytest.raises(UserError, match="add up to 1.2"):
        tail_of(torch.tensor([[0.7, 0.5]]).log(), 10)


# ---------------------------------------------------------------- what a server may do


@pytest.mark.parametrize("form", ["vllm", "llama"])
def test_another_tokenizer_is_found_by_the_probe(serve, form):
    other = load_mini_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    one, two = vocab["e"], vocab["t"]
    vocab["e"], vocab["t"] = two, one
    other._tokenizer = other.backend_tokenizer.from_str(json.dumps(state))
    assert other.encode("tee") != TOK.encode("tee")
    with pytest.raises(UserError, match="another tokenizer than the student"):
        opened(serve(form, tokenizer=other))


def test_pieces_of_text_show_another_tokenizer_where_there_is_no_tokenize(serve):
    class Shifted:
        def decode(self, ids):
            return TOK.decode([i + 1 for i in ids])

    with pytest.raises(UserError, match="another tokenizer than the student"):
        opened(serve(tokenizer=Shifted(), tokenize=False))
    assert opened(serve(tokenize=False)).width == V


def test_a_larger_model_behind_the_name_is_found(serve):
    wide = sharper(mini_model("causal", "xs", V + 64, seed=0), scale=1.0)
    wide.lm_head.weight.data[V:] *= 50
    with pytest.raises(UserError, match=r"knows the id \d+, the student's tokenizer ends"):
        opened(serve(model=wide))


def test_a_gateway_that_encodes_again_is_refused(serve):
    server = serve()
    server.alters = lambda ids: [*ids[:1], *ids]
    with pytest.raises(UserError, match="did not read the ids that were sent"):
        opened(server)


def test_limits_forms_and_temperatures_that_a_server_has_not(serve):
    with pytest.raises(UserError, match="max-logprobs 65.*|greater than 64"):
        opened(serve(), top_k=65)
    with pytest.raises(UserError, match="no log-probabilities with token ids"):
        opened(serve("plain"))
    with pytest.raises(UserError, match="temperature 1 only"):
        opened(serve(), temperature=2.0)
    with pytest.raises(UserError, match="does not apply the temperature"):
        opened(serve("llama", temperature=False), temperature=2.0)
    with pytest.raises(UserError, match="no option 'speed'"):
        opened(serve(), speed=3)
    gone = serve()
    gone.close()
    with pytest.raises(UserError, match="gave no usable answer"):
        opened(gone)


def test_a_slow_server_is_given_up_in_time(serve):
    server = serve()
    server.slow = 5.0
    with pytest.raises(UserError, match="no answer in time"):
        opened(server, timeout=0.3)


@pytest.mark.parametrize("form", ["vllm", "llama"])
def test_a_refused_row_is_left_out_and_the_others_are_learnt(serve, tmp_path, form):
    server = serve(form)
    remote = opened(server)
    bad = TOK.encode(ROWS[3]["prompt"])
    server.refuses = lambda ids: (
        bad == [i for i in ids if i in set(bad)][: len(bad)]
        and (ids[: len(bad)] == bad or ids[1 : len(bad) + 1] == bad)
    )
    cache = write_cache(tmp_path / "c", remote, TOK, ROWS, k=8)
    assert cache.refused == {"r3"} and cache.complete and len(cache) == 7
    rows = [row for row in ROWS if row["id"] in cache]
    assert train(student(), KD(TOK, cache), rows, STEPS).steps == 3
    server.refuses = lambda ids: True
    with pytest.raises(UserError, match="server"):
        write_cache(tmp_path / "d", opened(serve_again(server)), TOK, ROWS[:1], k=8)


@pytest.mark.parametrize("form", ["vllm", "llama"])
def test_rows_at_which_the_server_fails_are_left_out_however_many_positions_they_have(
    serve, tmp_path, capfd, form
):
    server = serve(form)
    remote = opened(server)
    bad = [TOK.encode(ROWS[i]["prompt"]) for i in (1, 2, 3)]
    server.crashes = lambda ids: any(ids[: len(b)] == b or ids[1 : len(b) + 1] == b for b in bad)
    cache = write_cache(tmp_path / "c", remote, TOK, ROWS, k=8)
    assert cache.refused == {"r1", "r2", "r3"} and cache.complete and len(cache) == 5
    server.crashes = lambda ids: True
    remote.known.clear()
    with pytest.raises(UserError, match="out of memory"):
        write_cache(tmp_path / "d", remote, TOK, ROWS, k=8)


def serve_again(server):
    "Let the probe pass once more, and refuse what follows."
    calls = len(server.calls)
    server.refuses = lambda ids: len(server.calls) > calls + 1
    return server


def test_a_refused_response_teaches_nothing(serve, teacher):
    server = serve()
    remote = opened(server)
    parts = (Part("reverse_kl", top_k=8),)
    method = GKD(TOK, remote, GKDConfig(rollouts=2, max_new_tokens=4, parts=parts))
    texts = [([5, 6], [7, 8]), ([9, 10], [11])]
    server.refuses = lambda ids: ids[:2] == [9, 10]
    remote.prefetch(texts)
    batch = causal_batch(texts, 0)
    assert target_logits(remote, batch)[2:].isnan().all()
    model = student()
    rows = [RolloutRow([Response(str(i), *text, "student")]) for i, text in enumerate(texts)]
    for row in rows:
        row.responses[0].log_student = [0.0] * len(row.responses[0].tokens)
    sums = method.loss_sums(model, method.collate(rows))
    alone = method.loss_sums(model, method.collate(rows[:1]))
    assert sums["reverse_kl"].item() == pytest.approx(alone["reverse_kl"].item(), abs=1e-5)
    grads = torch.autograd.grad(sums["reverse_kl"], model.lm_head.weight, retain_graph=True)[0]
    other = torch.autograd.grad(alone["reverse_kl"], model.lm_head.weight)[0]
    torch.testing.assert_close(grads, other, atol=1e-5, rtol=1e-4)
    assert response_batch and remote.refused


def test_rows_of_finished_shards_are_forgotten(serve, tmp_path):
    remote = opened(serve())
    cache = write_cache(tmp_path / "c", remote, TOK, ROWS, k=8, shard_tokens=1)
    assert len(cache) == 8 and len(remote.known) == 1


def test_known_rows_need_no_session(serve, monkeypatch):
    remote = opened(serve())
    remote.prefetch([([5, 6], [7, 8])])
    monkeypatch.setattr(remote.server, "scores", lambda rows: pytest.fail("asked again"))
    assert target_logits(remote, causal_batch([([5, 6], [7, 8])], 0)).shape == (2, V)


@pytest.mark.parametrize(
    "launch, there",
    [
        ({}, 2),
        ({"WORLD_SIZE": "4"}, 2),  # a cluster's own variable
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "0"}, 0),
    ],
)
def test_one_process_asks_for_a_rollout_at_once(serve, monkeypatch, launch, there):
    remote = opened(serve())
    method = GKD(TOK, remote, GKDConfig(parts=(Part("reverse_kl", top_k=8),)))
    remote.prefetch([([1, 2], [3])])
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    texts = [([5, 6], [7, 8]), ([9, 10], [11])]
    method.on_rollout([Response(str(i), *text, "student") for i, text in enumerate(texts)], None)
    assert len(remote.known) == there


@pytest.mark.parametrize("tokens", [None, 5, "abc", [1.5]])
def test_a_tokenize_of_another_kind_tells_nothing(serve, tokens):
    server = serve()
    answer = server.answer
    server.answer = lambda path, asked: (
        (200, {"tokens": tokens}) if path == "/tokenize" else answer(path, asked)
    )
    assert opened(server).width == V


# ---------------------------------------------------------------- the product


@pytest.mark.parametrize("objective", ["cached_forward_kl", "gkd", "on_policy_kd"])
def test_distill_from_a_server(serve, tmp_path, teacher, objective):
    server = serve()
    report = distill(ROWS, server.spec, (student(), TOK), objective, tmp_path / "a", **QUICK)
    assert report["teacher"] == "openai:tiny" and report["teacher_weights"] == "served by 127.0.0.1"
    local = distill(ROWS, (teacher, TOK), (student(), TOK), "sft", tmp_path / "b", **LOCAL)
    expected = local["results"]["teacher"]["perplexity"]
    assert report["results"]["teacher"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert report["results"]["student"]["nll"] != report["results"]["untrained"]["nll"]
    asked = len(server.calls)
    again = distill(ROWS, server.spec, (student(), TOK), objective, tmp_path / "a", **QUICK)
    assert again == report and len(server.calls) == asked
    text = "".join(p.read_text() for p in (tmp_path / "a").glob("*.json*"))
    assert server.url not in text and str(tmp_path) not in text


def test_distill_from_a_server_equals_distill_from_the_local_cache(serve, tmp_path, teacher):
    reports = []
    for name, source in (("here", (teacher, TOK)), ("there", serve("llama").spec)):
        call = (ROWS, source, (student(), TOK), "cached_forward_kl", tmp_path / name)
        more = {"top_k": 8} | (QUICK if name == "there" else LOCAL)
        reports.append(distill(*call, **more)["results"]["student"]["nll"])
    assert reports[0] == pytest.approx(reports[1], abs=1e-4)


@pytest.mark.parametrize(
    "objective, student_spec, problem",
    [
        ("forward_kl", None, "no whole distribution"),
        ("seqkd", None, "needs one local teacher"),
        ("uld", None, "needs one local teacher"),
        ("cached_forward_kl", "layers:1", "no layers to cut"),
        ("minillm", None, "text of the teacher is needed"),
        ("taid", None, "most probable tokens only"),
        ("distillm2", None, "text of the teacher is needed"),
    ],
)
def test_what_a_server_cannot_do_is_said_before_any_training(
    serve, tmp_path, objective, student_spec, problem
):
    with pytest.raises(UserError, match=problem):
        distill(
            ROWS,
            serve().spec,
            student_spec or (student(), TOK),
            objective,
            tmp_path / "a",
            **QUICK,
        )


def test_other_weights_behind_the_name_are_noticed_on_resuming(serve, tmp_path, monkeypatch):
    server = serve()
    call = (ROWS, server.spec, (student(), TOK), "cached_forward_kl", tmp_path / "a")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kd_notes.products.distill.train", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(*call, **QUICK)
    kept = server.model
    server.model = tiny(3)
    with pytest.raises(UserError, match="answers otherwise than when this folder was begun"):
        distill(*call, **QUICK)
    server.model = kept
    assert distill(*call, **QUICK)["steps"] == 2


# ---------------------------------------------------------------- several teachers


@pytest.fixture(scope="module")
def pairs(teacher):
    return [(teacher, TOK), (tiny(1), TOK)]


def test_a_mixture_of_equal_teachers_is_the_teacher(pairs, teacher):
    mixture = TeacherMixture([pairs[0]] * 3, [0.5, 0.3, 0.2])
    assert losses(mixture, lambda t: KD(TOK, t)) == pytest.approx(
        losses(teacher, lambda t: KD(TOK, t)), abs=1e-5
    )
    config = GKDConfig.recipe("on_policy_kd", rollouts=4, max_new_tokens=4)
    assert losses(mixture, lambda t: GKD(TOK, t, config)) == pytest.approx(
        losses(teacher, lambda t: GKD(TOK, t, config)), abs=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_probabilities_are_averaged_at_the_temperature_of_the_loss(pairs, temperature):
    batch = causal_batch([([5, 6], [9, 10, 12]), ([7], [8, 9])], 0)
    mixture = TeacherMixture(pairs, [0.7, 0.3], temperature=temperature)
    soft = [(target_logits(m, batch).double() / temperature).softmax(-1) for m, _ in pairs]
    expected = (0.7 * soft[0] + 0.3 * soft[1]).log()
    got = (target_logits(mixture, batch) / temperature).double().log_softmax(-1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="mixed at temperature"):
        KD(TOK, mixture, temperature=temperature + 1)


def test_a_token_that_one_teacher_rules_out_keeps_the_others_share(pairs):
    model = tiny(1)
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, V, bias=True)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data[:] = 0
    model.lm_head.bias.data[9] = -1e4
    batch = causal_batch([([5, 6], [9])], 0)
    alone = target_logits(pairs[0][0], batch).log_softmax(-1)[0, 9]
    mixed = target_logits(TeacherMixture([pairs[0], (model, TOK)]), batch)[0]
    assert mixed[9].item() == pytest.approx(alone.item() + math.log(0.5), abs=1e-4)
    assert mixed.isfinite().all()


def test_bfloat16_teachers_are_mixed_in_float32(pairs):
    half = [(tiny(seed).to(torch.bfloat16), TOK) for seed in (0, 1)]
    batch = causal_batch([([5, 6], [9, 10])], 0)
    mixed = target_logits(TeacherMixture(half), batch)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.logsumexp(-1), torch.zeros(2), atol=1e-5, rtol=0)


def test_each_row_asks_its_own_teacher(pairs, tmp_path):
    method = KD(TOK, pairs[0][0])
    items = [method.encode(row) for row in ROWS]
    routes = [(item["prompt"], row["domain"]) for item, row in zip(items, ROWS)]
    routed = RoutedTeachers(dict(zip(("art", "law"), pairs)), routes)
    got = target_logits(routed, method.collate(items))
    wanted = []
    for item, row in zip(items, ROWS):
        model = pairs[row["domain"] == "law"][0]
        wanted.append(target_logits(model, method.collate([item])))
    torch.testing.assert_close(got, torch.cat(wanted), atol=1e-4, rtol=1e-4)
    assert (forward_kl(*wanted[:1], got[: len(wanted[0])]) < 1e-6).all()
    changed = RoutedTeachers(dict(zip(("law", "art"), pairs)), routes)
    assert weights_hash(changed) != weights_hash(routed)
    write_cache(tmp_path / "c", routed, TOK, ROWS, k=8)
    with pytest.raises(UserError, match="another teacher"):
        write_cache(tmp_path / "c", changed, TOK, ROWS, k=8)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_routed_teachers_write_and_score_in_minillm(pairs, alpha):
    def method(signal):
        return MiniLLM(TOK, signal, MiniLLMConfig(pt_weight=0.0, max_new_tokens=4, alpha=alpha))

    encoded = [KD(TOK, pairs[0][0]).encode(row) for row in ROWS]
    steps = TrainConfig(max_steps=2, batch_size=4, lr=1e-3, log_every=1, device="cpu")
    found = []
    for signal in (
        pairs[0][0],
        RoutedTeachers({"a": pairs[0], "b": pairs[1]}, [(item["prompt"], "a") for item in encoded]),
    ):
        method_ = method(signal)
        method_.config.rollouts = 4
        found.append([r["loss"] for r in train(student(), method_, ROWS, steps).history])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    mixture = method(TeacherMixture(pairs))
    if alpha:
        with pytest.raises(UserError, match="text of the teacher is needed"):
            train(student(), mixture, ROWS, STEPS)


def test_different_vocabularies_are_refused(pairs, tmp_path):
    other = load_mini_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    other._tokenizer = other.backend_tokenizer.from_str(json.dumps(state))
    with pytest.raises(UserError, match="different vocabularies"):
        TeacherMixture([pairs[0], (tiny(1), other)])
    with pytest.raises(UserError, match="ids mean different tokens"):
        teachers = [pairs[0], (tiny(1), other)]
        distill(ROWS, teachers, (student(), TOK), "forward_kl", tmp_path / "a", **LOCAL)


@pytest.mark.parametrize("objective", ["forward_kl", "cached_forward_kl", "gkd"])
def test_distill_from_several(pairs, tmp_path, objective):
    out = tmp_path / "mixed"
    weighted = [(pairs[0], 0.7), (pairs[1], 0.3)]
    # the loss of an on-policy objective is taken at temperature 1, and another one is refused
    call = LOCAL if objective == "gkd" else {"temperature": 2.0} | LOCAL
    report = distill(ROWS, weighted, (student(), TOK), objective, out, **call)
    assert report["teachers"]["weights"] == [0.7, 0.3] and len(report["teacher_weights"]) == 2
    assert distill(ROWS, weighted, (student(), TOK), objective, out, **call) == report
    with pytest.raises(UserError, match="another teacher"):
        other = [(pairs[0], 0.6), (pairs[1], 0.4)]
        distill(ROWS, other, (student(), TOK), objective, out, **call)
    named = ({"law": pairs[0], "art": pairs[1]}, (student(), TOK), objective, tmp_path / "routed")
    routed = distill(ROWS, *named, route="domain", **LOCAL)
    assert routed["teachers"]["names"] == ["law", "art"]
    moved = [row | {"domain": "law"} for row in ROWS]
    with pytest.raises(UserError, match="another teachers"):
        distill(moved, *named, route="domain", **LOCAL)


def test_one_teacher_for_all_rows_equals_distill_from_it(pairs, tmp_path):
    rows = [row | {"domain": "law"} for row in ROWS]
    named = {"law": pairs[0], "art": pairs[1]}
    results = []
    for name, source, more in (("one", pairs[0], {}), ("routed", named, {"route": "domain"})):
        call = (rows, source, (student(), TOK), "reverse_kl", tmp_path / name)
        results.append(distill(*call, **LOCAL, **more)["results"]["student"]["reverse_kl"])
    assert results[0] == pytest.approx(results[1], abs=1e-5)


@pytest.mark.parametrize(
    "teachers, settings, problem",
    [
        (["a=0.7", "b=0.4"], {}, "add up to 1.1"),
        (["a=0.7", "b"], {}, "1 of 2 teachers have weights"),
        (["law=a", "b"], {"route": "domain"}, "has no name"),
        (["law=a", "law=b"], {"route": "domain"}, "two teachers have the same name"),
        (["law=a", "sea=b"], {"route": "domain"}, "no teacher for domain 'art'"),
        (["law=a", "art=b"], {"route": "field"}, "the field 'field' is missing"),
        ("a", {"route": "domain"}, "a route needs several teachers"),
        ({"law": "a"}, {}, "teachers with names need a route"),
        (["openai:http://127.0.0.1:1/v1#m", "b"], {}, "none may be on a server"),
    ],
)
def test_mistakes_with_several_teachers(tmp_path, teachers, settings, problem):
    for spec in ("a", "b"):
        tiny().save_pretrained(tmp_path / spec)
    if isinstance(teachers, list):
        places = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
        teachers = [
            "=".join(places.get(part, part) for part in one.split("="))
            if not one.startswith("openai")
            else one
            for one in teachers
        ]
    with pytest.raises(UserError, match=problem):
        distill(
            ROWS, teachers, (student(), TOK), "forward_kl", tmp_path / "o", **(LOCAL | settings)
        )


def test_the_command_takes_several_teachers_and_a_server(pairs, serve, tmp_path):
    for name, (model, tok) in zip("ab", pairs):
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    server = serve()
    quick = [f"--set={name}={json.dumps(value)}" for name, value in LOCAL.items()]
    common = ["distill", "--data", str(tmp_path / "rows.jsonl"), *quick]
    a, b = tmp_path / "a", tmp_path / "b"
    calls = {
        "mixed": ["--teacher", f"{a}=0.7", "--teacher", f"{b}=0.3", "--student", "layers:1"],
        "routed": ["--teacher", f"law={a}", "--teacher", f"art={b}", "--student", str(b)]
        + ["--set", "route=domain"],
        "served": ["--teacher", server.spec, "--student", str(b)]
        + ["--objective", "cached_forward_kl"],
    }
    for name, call in calls.items():
        done = CliRunner().invoke(app, [*common, *call, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
    shown = [read_json(tmp_path / name / "report.json")["teacher"] for name in calls]
    assert shown == ["a (0.7) and b (0.3)", "law: a; art: b", "openai:tiny"]
