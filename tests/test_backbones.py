"""Backbones: what their corpora say and do not say, what the committed ones know, and the arms and controls that were added with them."""

import re
import shutil
from dataclasses import replace

import pytest
import torch

import kd_notes.data.fact_text as fact_text
import kd_notes.experiments.backbones as backbones
import kd_notes.experiments.stepwise as stepwise
import kd_notes.methods.step_by_step as step_by_step
from kd_notes.core import data_dir, UserError
from kd_notes.data.examples import load_split
from kd_notes.data.tasks import facts, GENERATORS, setting_world, world_of
from kd_notes.experiments.stepwise import arm_rows, ARMS, Stepwise
from kd_notes.methods.step_by_step import MutualInformation, step_rows, StepByStep
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.models.pretrained import load_pretrained
from kd_notes.training.checkpoint import save_model

torch.set_num_threads(1)
TOK = load_mini_tokenizer()
POOL = load_split("nli", "pool")[:24]
LINES = 3000


@pytest.fixture(scope="module")
def corpora():
    return {regime: fact_text.corpus_lines(name, LINES) for regime, name in backbones.NAMES.items()}


# ---------------------------------------------------------------- the corpora


def test_unknown_says_no_fact_of_a_task_and_known_says_most_of_them(corpora):
    assert not [f for line in corpora["unknown"] for f in fact_text.stated_facts(line)]
    said = {f for line in corpora["known"] for f in fact_text.stated_facts(line)}
    for task in GENERATORS:
        things = fact_text._things(task)
        missing = [t for t, kinds in things.items() if not any((t, k) in said for k in kinds)]
        assert len(missing) <= 0.3 * len(things), (task, missing)


def test_the_corpora_differ_in_the_things_only(corpora):
    same = sum(a == b for a, b in zip(corpora["known"], corpora["unknown"], strict=True))
    assert 0.05 * LINES < same < 0.5 * LINES  # scenes, prose, sums
    for known, unknown in zip(corpora["known"][:200], corpora["unknown"]):
        plain = [re.sub(r"\W", "", w) for w in fact_text.without_things(known).lower().split()]
        other = {re.sub(r"\W", "", w) for w in unknown.lower().split()}
        if known != unknown:
            assert len([w for w in plain if w in other]) >= len(plain) - 4, (known, unknown)


@pytest.mark.parametrize("regime", stepwise.REGIMES)
def test_no_input_of_a_task_and_no_label_stands_in_a_corpus(corpora, regime):
    text = "\n".join(corpora[regime]).lower()
    for task in GENERATORS:
        for split in ("validation", "test"):
            for example in load_split(task, split):
                assert example.input.lower() not in text
                body = re.split(r"Hypothesis: |Premise: |Question: | Choices: ", example.input)
                assert not [part for part in body if len(part) > 30 and part.lower() in text]
    for word in ("premise: ", "hypothesis: ", "choices: ", "entailment", "contradiction"):
        assert word not in text


def test_no_line_joins_facts_that_validation_or_test_join(corpora):
    topics = facts("nli")["topics"].values()
    phrases = [p for t in topics for ps in t["values"].values() for p in ps]
    cities = [c for cs in facts("anli")["cities"].values() for c in cs]
    things = [t for p in facts("cqa")["purposes"].values() for t in p["things"]]
    joined = 0
    for line in corpora["known"]:
        for names in (phrases, cities):
            here = [n for n in names if n in line and fact_text._has(line, n)]
            pairs = [(a, b) for a in here for b in here if a < b and a not in b and b not in a]
            joined += len(pairs)
            assert all(world_of(a, b) == "train" for a, b in pairs), line
        for setting, phrases_of in facts("cqa")["settings"].items():
            if any(re.search(rf"\b{p}\b(?! lobby)", line, re.I) for p in phrases_of):
                here = [t for t in things if t in line and fact_text._has(line, t)]
                assert all(setting_world(t, setting) == "train" for t in here), line
    assert joined > 100


def test_invented_things_differ_from_each_other_and_from_every_word_of_the_tasks():
    things = [thing for task in GENERATORS for thing in fact_text._things(task)]
    made = [fact_text.invented(thing).lower() for thing in set(things)]
    assert len(set(made)) == len(made)
    words = {w for thing in things for w in thing.split()}
    assert not {w for text in made for w in text.split()} & words


def test_a_causal_model_reads_blocks_of_one_length(corpora):
    for lines in corpora.values():
        rows = backbones.backbone_rows(TOK, "causal", lines[:400], 96, seed=0)
        assert len(rows) > 50
        assert {len(r["prompt"] + r["completion"]) for r in rows} == {96}


def test_an_encoder_decoder_reads_each_line_and_writes_its_rest(corpora):
    for lines in corpora.values():
        rows = backbones.backbone_rows(TOK, "t5", lines[:400], 40, seed=0)
        assert len(rows) == 400 and rows != backbones.backbone_rows(TOK, "t5", lines[:400], 40, 1)
        for line, row in zip(lines, rows):
            halves = row["prompt"], row["completion"]
            assert all(len(ids) > 1 and ids[-1] == TOK.eos_token_id for ids in halves)
            ids = [i for half in halves for i in half[:-1]]
            assert ids == TOK.encode(line, add_special_tokens=False)[:40]
    assert backbones.backbone_rows(TOK, "t5", ["a"], 40, seed=0) == []  # nothing to cut


def test_all_weights_of_a_mini_encoder_decoder_start_as_small_as_its_width_asks():
    "AdamW moves them alike, so embeddings of standard deviation 1 would learn ten times more slowly."
    model = mini_model("t5", "s", len(TOK), seed=0)
    assert float(model.shared.weight.detach().std()) == pytest.approx(96**-0.5, rel=0.02)
    largest = {
        name: float(p.detach().std()) for name, p in model.named_parameters() if p.dim() == 2
    }
    assert max(largest.values()) < 3 * 96**-0.5, largest
    assert not model.config.scale_decoder_outputs and model.lm_head.weight is model.shared.weight


def test_a_mini_encoder_decoder_is_the_same_after_saving(tmp_path):
    "How its logits are scaled stands in the configuration, which transformers reads in a way of its own."
    model = mini_model("t5", "xs", len(TOK), seed=0).eval()
    save_model(model, tmp_path / "saved", TOK)
    again = load_pretrained(tmp_path / "saved", device="cpu")[0].eval()
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        one, other = (each(input_ids=ids, labels=ids).logits for each in (model, again))
    assert torch.equal(one, other)


# ---------------------------------------------------------------- the committed weights


def test_each_model_knows_the_things_of_cqa_that_it_has_read_of():
    "The other tasks' facts came by less often; no model knows more of the other regime's things than chance."
    chance = {"nli": 0.33, "anli": 0.25, "cqa": 0.11, "svamp": 0.08}
    for regime, name in backbones.NAMES.items():
        model = stepwise.load_backbone("causal", f"{regime}/s", TOK)
        own = backbones.knows(model, TOK, "cqa", name)
        assert sum(own) / len(own) > {"known": 0.95, "unknown": 0.6}[regime]
        (other,) = {fact_text.real, fact_text.invented} - {name}
        for task in GENERATORS:
            right = backbones.knows(model, TOK, task, other)
            assert sum(right) / len(right) < chance[task] + 0.2, (regime, task)


def test_the_larger_models_know_the_facts_of_every_task_that_they_have_read_of():
    chance = {"nli": 0.32, "anli": 0.25, "cqa": 0.11, "svamp": 0.08}
    for regime, name in backbones.NAMES.items():
        model = stepwise.load_backbone("causal", f"{regime}/m", TOK)
        (other,) = set(backbones.NAMES.values()) - {name}
        for task, guessed in chance.items():
            right = backbones.knows(model, TOK, task, name)
            assert sum(right) / len(right) > guessed + 0.1, (regime, task)
            right = backbones.knows(model, TOK, task, other)
            assert sum(right) / len(right) < guessed + 0.1, (regime, task)


def test_the_encoder_decoders_know_the_things_of_cqa_that_they_have_read_of():
    for regime, name in backbones.NAMES.items():
        model = stepwise.load_backbone("t5", f"{regime}/s", TOK)
        (other,) = set(backbones.NAMES.values()) - {name}
        own, others = (backbones.knows(model, TOK, "cqa", names) for names in (name, other))
        assert sum(own) / len(own) > {"known": 0.85, "unknown": 0.2}[regime]
        assert sum(others) / len(others) < 0.11 + 0.12


def test_facts_are_asked_in_batches_as_one_by_one(monkeypatch):
    for family in ("causal", "t5"):
        model = stepwise.load_backbone(family, "known/s", TOK)
        together = backbones.knows(model, TOK, "nli")
        with monkeypatch.context() as patch:
            patch.setattr(backbones, "PROBES", 1)
            assert backbones.knows(model, TOK, "nli") == together


def test_the_files_are_small_half_precision_and_complete():
    from safetensors import safe_open

    folder = data_dir() / "backbones"
    wanted = {
        stepwise.backbone_file(b["family"], f"{b['regime']}/{b['size']}").name
        for b in backbones.COMMITTED
    }
    files = {p.name: p for p in folder.glob("*.safetensors")}
    assert set(files) == wanted
    assert sum(p.stat().st_size for p in files.values()) < 30e6
    for path in files.values():
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    for licensed in (folder, data_dir() / "prose"):
        assert "Princeton University" in (licensed / "LICENSE-WordNet").read_text()


def test_a_changed_or_unknown_backbone_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "backbones"
    shutil.copytree(data_dir() / "backbones", folder)
    path = folder / "causal-s-known.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(stepwise, "data_dir", lambda: tmp_path)
    with pytest.raises(UserError, match="differs from its recorded checksum"):
        stepwise.load_backbone("causal", "known/s", TOK)
    with pytest.raises(UserError, match="no backbone 'causal-xl-known'"):
        stepwise.load_backbone("causal", "known/xl", TOK)


def test_the_weights_are_among_the_inputs_of_a_run():
    students = Stepwise()
    run = {"task": "nli", "arm": "dss", "n": 8, "seed": 0, "lr": 1e-3}
    keys, sums = set(), set()
    for regime in stepwise.REGIMES:
        made = students.parameters(**run, size=f"{regime}/s")
        keys.add(students.key(made))
        sums.add(students.inputs(made)[f"backbones/causal-s-{regime}.safetensors"])
    assert len(keys) == len(sums) == 2


def test_all_seeds_start_from_the_same_weights():
    run = {"family": "causal", "size": "known/s"}
    first, second = (stepwise.new_student(run | {"seed": seed})[0] for seed in (0, 1))
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}


def test_a_killed_pretraining_goes_on_where_it_was(tmp_path, monkeypatch):
    "Stopped after its checkpoint, it ends with the weights of an uninterrupted one."
    run = backbones.Backbones().parameters(
        regime="known", size="xs", steps=6, lines=300, batch_size=4
    )
    monkeypatch.setattr(backbones, "SAVE_EVERY", 2)
    whole = backbones.Backbones().train(run, tmp_path / "whole")

    class Killed(BaseException):
        pass

    steps = []
    real = backbones.SFT.loss_sums

    def stop(self, model, batch):
        steps.append(1)
        if len(steps) == 5:
            raise Killed
        return real(self, model, batch)

    monkeypatch.setattr(backbones.SFT, "loss_sums", stop)
    with pytest.raises(Killed):
        backbones.Backbones().train(run, tmp_path / "part")
    monkeypatch.setattr(backbones.SFT, "loss_sums", real)
    again = backbones.Backbones().train(run, tmp_path / "part")
    assert again["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    names = ("whole", "part")
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in names)
    assert one == other


# ---------------------------------------------------------------- arms and controls


def test_the_label_comes_first_and_the_answer_ends_where_the_reason_begins():
    row = arm_rows("label_first", "nli", 4)[0]
    ((term, prompt, completion),) = row.pairs
    label, _, reason = completion.partition(f" {step_by_step.REASON} ")
    assert term == "label" and prompt.startswith("Premise: ")
    assert label in ("entailment", "neutral", "contradiction") and len(reason.split()) > 2
    bare = step_by_step.label_first_rows([replace(POOL[0], rationale="")])
    assert bare[0].pairs[0][2] == POOL[0].label


def test_mixed_words_are_the_rows_own_and_key_words_keep_their_order():
    mixed, key = step_by_step.mixed_words(POOL, seed=0), step_by_step.key_words(POOL)
    assert mixed == step_by_step.mixed_words(POOL, seed=0) != step_by_step.mixed_words(POOL, seed=1)
    for e, m, k in zip(POOL, mixed, key):
        assert sorted(m.rationale.split()) == sorted(e.rationale.split())
        words = [w.strip(".,;:") for w in e.rationale.split()]
        kept = k.rationale.split()
        assert len(kept) == min(step_by_step.KEY_TOKENS, len(words))
        places = [words.index(w) for w in kept]
        assert places == sorted(places)
    own = next(e for e in POOL if e.rationale.endswith("So it fits."))
    assert "fits" not in key[POOL.index(own)].rationale.split()[:2]


def test_added_controls_share_examples_and_labels_with_step_by_step():
    rows = {arm: arm_rows(arm, "nli", 40, seed=3) for arm in ("dss", "mixed", "key", "mutual")}
    for made in rows.values():
        for ours, theirs in zip(made, rows["dss"], strict=True):
            assert ours.id == theirs.id and ours.pairs[0] == theirs.pairs[0]
    assert rows["mutual"] == rows["dss"] and ARMS["mutual"].beta == 0.1
    assert not ARMS["mixed"].control and ARMS["shuffled"].control


def _loss(method, rows, model, parts=1):
    "The loss of an effective batch, in this many minibatches."
    items = [method.encode(row) for row in rows]
    size = -(-len(items) // parts)
    batches = [method.collate(items[i : i + size]) for i in range(0, len(items), size)]
    counts = [method.token_counts(batch) for batch in batches]
    total = {term: sum(c[term] for c in counts) for term in counts[0]}
    sums = [method.loss_sums(model, batch) for batch in batches]
    return sum(
        method.loss_weights[term] * s[term] / n for s in sums for term, n in total.items() if n
    )


@pytest.mark.parametrize("family", ["causal", "t5"])
def test_mutual_information_without_weight_is_step_by_step(family):
    model, rows = mini_model(family, "xs", len(TOK), seed=0), step_rows(POOL[:6])
    ours = _loss(MutualInformation(TOK, family, 0.5, 0.0), rows, model)
    assert float(ours.detach()) == pytest.approx(
        float(_loss(StepByStep(TOK, family), rows, model).detach()), abs=1e-5
    )


@pytest.mark.parametrize("family", ["causal", "t5"])
def test_mutual_information_does_not_change_with_accumulation_or_padding(family):
    model = mini_model(family, "xs", len(TOK), seed=0)
    short = replace(POOL[1], rationale="")
    rows = step_rows([POOL[0], short, *POOL[2:7]])
    method = MutualInformation(TOK, family, 0.5, 5.0)
    whole = _loss(method, rows, model)
    for parts in (2, 7):
        assert float(_loss(method, rows, model, parts)) == pytest.approx(float(whole), abs=1e-4)


def test_mutual_information_moves_no_label_and_every_rationale():
    "The gradient of the term alone, with respect to the logits of each copy."
    method = MutualInformation(TOK)
    rows = step_rows(POOL[:3])
    batch = method.collate([method.encode(row) for row in rows])
    model = mini_model("causal", "xs", len(TOK), seed=0)
    method.loss_sums(model, batch)  # the first call also tries the head
    kept = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, __, out: kept.append(out) or out.retain_grad())
    method.loss_sums(model, batch)["mutual"].backward()
    handle.remove()
    gradient = kept[0].grad.reshape(-1, len(TOK)).abs().sum(1)
    label = int(batch.columns["label_tokens"])
    assert float(gradient[:label].sum()) == 0 and float(gradient[label:].sum()) > 0


def test_mutual_information_of_rows_without_rationales_is_no_term():
    method = MutualInformation(TOK)
    batch = method.collate([method.encode(r) for r in step_rows([replace(POOL[0], rationale="")])])
    model = mini_model("causal", "xs", len(TOK), seed=0)
    assert method.token_counts(batch)["mutual"] == 0
    assert float(method.loss_sums(model, batch)["mutual"]) == 0
    with pytest.raises(UserError, match="not a weight"):
        MutualInformation(TOK, beta=-1)
