"""Posts with pictures: their labels, OCR, captions, dated evidence, rows for a student, adapters, a student that sees."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import tiny_llava

from kd_notes.core import read_json, read_jsonl, rng, UserError
from kd_notes.data.answers import unpack_bits
from kd_notes.data.posts import draw_posts, open_picture, picture_of, PLACES, VERDICTS
from kd_notes.data.rows import TextRow
from kd_notes.experiments.misinformation import (
    folded,
    liar_rows,
    likeliest,
    Misinformation,
    POST_ARMS,
    RULINGS,
    student_rows,
    two_task_row,
    view,
)
from kd_notes.experiments.post_readers import (
    PostPriors,
    PostsSeen,
    prompted_scores,
    Reading,
    reading_row,
    reading_scores,
    RuleTeacher,
    StatesSFT,
)
from kd_notes.generation.completions import manifest_path
from kd_notes.methods.evidence import (
    evidence_rows,
    EvidenceStore,
    instruction,
    load_seeing,
    parse_answer,
    PictureSFT,
    read_pictures,
    Seen,
    seen_answers,
    SignReader,
    train_captioner,
    write_captions,
)
from kd_notes.models.frozen_layers import states_of
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.models.pretrained import merge_adapters
from kd_notes.training.checkpoint import save_model
from kd_notes.training.loop import train
from kd_notes.training.method import SFT
from kd_notes.training.setup import add_lora
from kd_notes.training.state import TrainConfig


@pytest.fixture(scope="module")
def world():
    return draw_posts(train=90, validation=12, test=45, seed=3)


@pytest.fixture(scope="module")
def reader():
    return SignReader()


def seen_by_author(posts):
    "What a perfect reader of the pictures would return."
    return {post.id: Seen(post.sign, post.scene) for post in posts}


# --- posts ------------------------------------------------------------------------------------------------------------------------


def label_from_texts(post, store):
    "The label of a post, from the sentences in the store alone."
    found = []
    for row in store:
        said = re.fullmatch(r"At (\w+) stand (\d \w+ \w+)\.", row["text"])
        if said and said[1] == post.place and row["date"] < post.date:
            found.append((row["date"], said[2]))
    if not found:
        return "unverified"
    return "true" if max(found)[1] == post.scene else "false"


def test_the_label_follows_from_the_newest_report_before_the_post(world):
    posts, store = world
    for part in posts.values():
        assert [post.label for post in part] == [label_from_texts(post, store) for post in part]
        assert set(Counter(post.label for post in part).values()) == {len(part) // 3}


def test_splits_share_no_place_and_the_same_seed_draws_the_same(world):
    posts, store = world
    assert (posts, store) == draw_posts(train=90, validation=12, test=45, seed=3)
    assert posts != draw_posts(train=90, validation=12, test=45, seed=4)[0]
    places = [{post.place for post in part} for part in posts.values()]
    assert len(set.union(*places)) == sum(map(len, places)) and set.union(*places) <= set(PLACES)


def test_every_kind_of_post_says_its_claim_somewhere(world):
    kinds = Counter(post.needs for post in world[0]["train"])
    assert set(kinds) == {(), ("sign",), ("scene",), ("sign", "scene")}
    for post in world[0]["train"]:
        assert post.place in f"{post.text} {post.sign}"


def test_a_picture_is_the_same_at_every_call_and_differs_between_posts(world):
    first, second = (np.asarray(picture_of(post)) for post in world[0]["test"][:2])
    assert np.array_equal(first, picture_of(world[0]["test"][0]))
    assert first.shape == (128, 192, 3) and not np.array_equal(first, second)


# --- what is written and seen -----------------------------------------------------------------------------------------------------


def test_the_engine_reads_the_signs(world, reader):
    posts = world[0]["test"][:12]
    right = [reader(picture_of(post)) == post.sign for post in posts]
    assert sum(right) >= 11


def test_a_picture_without_text_reads_as_nothing(reader):
    from PIL import Image

    assert reader(Image.new("RGB", (192, 128), "#e8eef5")) == ""


def test_a_captioner_learns_to_count_in_seconds(world):
    model = train_captioner(pictures=700, epochs=6)
    posts = world[0]["train"]
    captions = write_captions(model, [picture_of(post) for post in posts])
    assert np.mean([c == post.scene for c, post in zip(captions, posts)]) > 0.75


@pytest.mark.parametrize("library", ["rapidocr", "onnxruntime"])
def test_a_missing_engine_is_named_before_any_picture_is_read(monkeypatch, library, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=library) as error:
        read_pictures(
            {"a": lambda: pytest.fail("a picture was opened")}, path=tmp_path / "seen.jsonl"
        )
    assert "pip install" in str(error.value) or "Install" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_does_not_open_is_named_before_any_is_read(world, tmp_path):
    posts = world[0]["test"][:3]
    paths = {post.id: str(tmp_path / f"{post.id}.png") for post in posts}
    for post in posts:
        picture_of(post).save(paths[post.id])
    broken = posts[2].id
    (tmp_path / f"{broken}.png").write_bytes(b"\x89PNG and then nothing")
    read = []
    with pytest.raises(UserError, match="does not open") as error:
        read_pictures(paths, read.append, path=tmp_path / "seen.jsonl")
    assert broken in str(error.value) and not read
    (tmp_path / f"{broken}.png").unlink()
    with pytest.raises(UserError, match="does not open"):
        open_picture(paths[broken])


def test_reading_is_killed_and_goes_on(tmp_path):
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from PIL import Image
        from kd_notes.methods.evidence import read_pictures
        log = Path(sys.argv[1]) / "log"

        def slow(image):
            with log.open("a") as file:
                file.write(f"{image.size[0]}\\n")
            time.sleep(0.1)
            return f"width {image.size[0]}"

        pictures = {f"p{i}": lambda i=i: Image.new("RGB", (20 + i, 9)) for i in range(12)}
        seen = read_pictures(pictures, slow, path=Path(sys.argv[1]) / "seen.jsonl", batch=2)
        assert [s.sign for s in seen.values()] == [f"width {20 + i}" for i in range(12)]
        print("complete")
        """)
    call = [sys.executable, "-c", code, str(tmp_path)]
    first = subprocess.Popen(call)
    until = time.time() + 60
    while not (tmp_path / "seen.jsonl").exists() and time.time() < until:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = read_jsonl(tmp_path / "seen.jsonl")
    assert 2 <= len(kept) < 12
    before = (tmp_path / "log").read_text().split()
    second = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert second.stdout == "complete\n", second.stderr
    later = (tmp_path / "log").read_text().split()[len(before) :]
    assert not {row["sign"].split()[1] for row in kept} & set(later)
    assert len(read_jsonl(tmp_path / "seen.jsonl")) == 12


def test_what_other_eyes_have_seen_is_refused(tmp_path):
    from PIL import Image

    pictures = {"p": lambda: Image.new("RGB", (9, 9))}
    read_pictures(pictures, lambda image: "a", path=tmp_path / "seen.jsonl", identity="one")
    with pytest.raises(UserError, match="another job"):
        read_pictures(pictures, lambda image: "b", path=tmp_path / "seen.jsonl", identity="two")


@pytest.mark.parametrize("as_path", [True, False])
def test_a_picture_that_has_changed_is_not_taken_as_read(tmp_path, as_path):
    from PIL import Image

    def look(colour):
        picture = Image.new("RGB", (8, 8), colour)
        picture.save(tmp_path / "a.png")
        pictures = {"p": tmp_path / "a.png" if as_path else picture}
        return read_pictures(pictures, lambda image: colour, path=tmp_path / "seen.jsonl")["p"]

    assert look("red").sign == look("red").sign == "red"
    with pytest.raises(UserError, match="another job.*pictures"):
        look("blue")


def test_pictures_that_were_all_read_begin_no_session(tmp_path):
    from PIL import Image

    file = tmp_path / "seen.jsonl"
    pictures = {"p": lambda: Image.new("RGB", (9, 9))}
    for _ in range(2):
        assert read_pictures(pictures, lambda image: "a", path=file)["p"].sign == "a"
    manifest = read_json(manifest_path(file))
    assert [one["rows"] for one in manifest["sessions"]] == [1] and manifest["status"] == "done"


# --- evidence ---------------------------------------------------------------------------------------------------------------------


def test_nothing_later_than_the_post_is_found_unless_it_is_asked_for(world):
    posts, store = world
    evidence = EvidenceStore(store)
    leaks = 0
    for post in posts["test"]:
        query = f"{post.text} {post.sign} {post.scene}"
        dated = evidence.search(query, post.date, k=6)
        assert dated and all(row["date"] < post.date for row in dated)
        assert [row["date"] for row in dated] == sorted((r["date"] for r in dated), reverse=True)
        leaks += any(row["id"] == f"check.{post.id}" for row in evidence.search(query, k=3))
    assert leaks > 0.8 * len(posts["test"])


def test_a_text_of_the_same_day_is_not_known_yet():
    store = [{"id": str(day), "date": day, "text": f"Alder, day {day}"} for day in (3, 4, 5)]
    found = EvidenceStore(store).search("Alder", before=4)
    assert [row["date"] for row in found] == [3]


def test_dates_may_be_texts():
    days = ("2026-03-09", "2026-03-12", "2026-11-01")
    store = [{"id": day, "date": day, "text": "news from Alder"} for day in days]
    found = EvidenceStore(store).search("Alder", before="2026-10-31")
    assert [row["date"] for row in found] == ["2026-03-12", "2026-03-09"]
    assert "2026-03-12: news from Alder" in instruction(TextPost("2026-10-31"), evidence=found)


class TextPost:
    def __init__(self, date, text="Look at Alder", id="p", label="true"):
        self.date, self.text, self.id, self.label = date, text, id, label


@pytest.mark.parametrize(
    "texts, what",
    [
        ([], "is empty"),
        ([{"id": "a", "text": "news"}], "date missing"),
        ([{"id": "a", "date": 3, "text": ""}], "text missing"),
        ([{"id": "a", "date": 3, "text": "the x"}], "no text of the store has a word"),
        ([{"id": "a", "date": d, "text": "Alder"} for d in (3, "3")], "'3' cannot be compared"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused(texts, what):
    with pytest.raises(UserError, match=what):
        EvidenceStore(texts)


def test_dates_that_cannot_be_compared_are_refused(world):
    for query in ("Alder", "a word of no report"):
        with pytest.raises(UserError, match="cannot be compared"):
            EvidenceStore(world[1]).search(query, before="2026-03-12")


def test_a_text_of_day_0_with_the_id_0_is_a_text():
    found = EvidenceStore([{"id": 0, "date": 0, "text": "news from Alder"}]).search("Alder", 1)
    assert [row["id"] for row in found] == [0]


@pytest.mark.parametrize("k", [-1, "many", 1.5, None])
def test_a_number_of_texts_that_is_none_is_refused(world, k):
    with pytest.raises(UserError, match="setting k"):
        EvidenceStore(world[1]).search("Alder", k=k)


@pytest.mark.parametrize(
    "text, found",
    [
        ("true. As in the post.", ("true", "As in the post.")),
        ("Label: **False** - it was blue", ("false", "it was blue")),
        ("Nobody says so. So it is unverified.", ("unverified", "Nobody says so.")),
        ("unverified", ("unverified", "")),
        ("I cannot say.", ("", "I cannot say.")),
        ("It is not true.", ("", "It is not true.")),
        ("truely a nice day", ("", "truely a nice day")),
        ("", ("", "")),
    ],
)
def test_labels_of_free_text(text, found):
    assert parse_answer(text) == found


def test_the_student_never_reads_what_the_teacher_was_told(world):
    posts, store = world
    asked = []

    def write(prompts):
        asked.extend(prompts)
        return ["false. It was otherwise." for _ in prompts]

    part = posts["train"][:9]
    evidence = EvidenceStore(store)
    told, none = evidence_rows(part, seen_by_author(part), evidence, write, tell=True)
    alone, _ = evidence_rows(part, seen_by_author(part), evidence, write, first="reason")
    assert none == 0 and [row.prompt for row in told] == [row.prompt for row in alone]
    assert all(f"It is {post.label}. Explain why." in p for post, p in zip(part, asked))
    assert not any("Explain why" in p for p in asked[9:])
    assert [row.completion for row in told] == [f"{p.label}. It was otherwise." for p in part]
    assert {row.completion for row in alone} == {"It was otherwise. So it is false."}
    assert all(post.reason not in row.prompt for post, row in zip(part, told))


def test_answers_without_a_label_are_left_out_and_counted(world):
    part = world[0]["train"][:6]
    answers = ["true. Yes.", "Hm.", "", "false. No.", "I do not know", "unverified"]
    rows, left_out = evidence_rows(part, {}, EvidenceStore(world[1]), lambda prompts: answers)
    assert left_out == 3 and [row.id for row in rows] == [part[i].id for i in (0, 3, 5)]
    assert all("Sign:" not in row.prompt and "Picture:" not in row.prompt for row in rows)


def test_a_label_outside_the_three_is_refused_before_the_teacher_is_asked(world):
    posts = [TextPost(41, label="true"), TextPost(42, id="q", label="pants on fire")]
    with pytest.raises(UserError, match="pants on fire") as error:
        evidence_rows(posts, {}, EvidenceStore(world[1]), lambda p: pytest.fail("asked"), tell=True)
    assert "post q" in str(error.value) and ", ".join(VERDICTS) in str(error.value)
    with pytest.raises(UserError, match="'end'"):
        evidence_rows([], {}, EvidenceStore(world[1]), list, first="end")


@pytest.mark.parametrize("write", [lambda prompts: [], lambda prompts: [None] * len(prompts)])
def test_a_teacher_that_returns_something_else_is_named(world, write):
    with pytest.raises(UserError, match="one text for each prompt"):
        evidence_rows(world[0]["train"][:2], {}, EvidenceStore(world[1]), write)


# --- adapters ---------------------------------------------------------------------------------------------------------------------


def lora_rows(world):
    part = world[0]["train"][:8]
    return [TextRow(p.id, instruction(p, p.sign, p.scene), f"{p.label}. {p.reason}") for p in part]


def base_model():
    tokenizer = load_mini_tokenizer()
    return mini_model("causal", "xxs", len(tokenizer), seed=1), tokenizer


def test_an_untrained_adapter_leaves_the_loss_of_the_base_model(world):
    model, tokenizer = base_model()
    method = SFT(tokenizer)
    batch = method.collate([method.encode(row) for row in lora_rows(world)])
    own = model(**{name: batch[name] for name in batch}).loss.detach()
    count = method.token_counts(batch)["loss"]
    student = add_lora(model, {"r": 4, "alpha": 8}, seed=0)
    assert all(not p.any() for name, p in student.named_parameters() if "lora_B" in name)
    ours = method.loss_sums(student, batch)["loss"].detach() / count
    assert torch.allclose(own, ours, rtol=0, atol=1e-6)
    for name, p in student.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    changed = method.loss_sums(student, batch)["loss"].detach() / count
    assert abs(changed - own) > 1e-3


def test_merged_weights_give_the_logits_of_the_trained_student(world):
    model, tokenizer = base_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    cfg = TrainConfig(max_steps=6, batch_size=4, lr=2e-2, lora={"r": 4}, device="cpu")
    student = train(model, SFT(tokenizer), lora_rows(world), cfg).model.eval()
    ids = torch.tensor([tokenizer.encode(lora_rows(world)[0].prompt)])
    with torch.no_grad():
        adapted = student(ids).logits
        merged = merge_adapters(student)
        assert torch.allclose(merged(ids).logits, adapted, atol=1e-5)
    weights = dict(merged.named_parameters())
    assert any(not torch.equal(p, weights[name]) for name, p in before.items())


# --- a student that sees ----------------------------------------------------------------------------------------------------------


def test_a_vision_language_student_learns_from_pixels(world):
    model, processor = tiny_llava()
    method = PictureSFT(processor)
    rows = [
        {"id": p.id, "prompt": instruction(p), "completion": p.label, "image": picture_of(p)}
        for p in world[0]["train"][:6]
    ]
    items = [method.encode(row) for row in rows]
    batch = method.collate(items)
    own = model(**{name: batch[name] for name in batch}).loss.item()
    ours = method.loss_sums(model, batch)["loss"].item() / method.token_counts(batch)["loss"]
    assert ours == pytest.approx(own, abs=1e-5)
    batch.inputs["pixel_values"] = batch["pixel_values"].roll(1, 0)
    assert method.loss_sums(model, batch)["loss"].item() != pytest.approx(6 * ours, abs=1e-6)
    # rows of different lengths: a row alone has the loss that it has beside longer ones
    alone = [method.loss_sums(model, method.collate([item]))["loss"].item() for item in items]
    count = method.token_counts(batch)["loss"]
    assert sum(alone) == pytest.approx(ours * count, rel=1e-4)


def test_a_student_can_tell_pictures_apart_by_their_pixels_alone():
    "The same words for both pictures: without pixels, a label costs at least ln 2 nats."
    from PIL import Image

    model, processor = tiny_llava()
    method = PictureSFT(processor)
    rows = [
        {"id": c, "prompt": "Say:\n", "completion": label, "image": Image.new("RGB", (64, 48), c)}
        for c, label in (("red", "true"), ("blue", "false"))
    ]
    cfg = TrainConfig(max_steps=60, batch_size=2, lr=1e-2, device="cpu")
    done = train(model, method, rows, cfg)
    with torch.no_grad():
        batch = method.collate([method.encode(row) for row in rows])
        nats = method.loss_sums(done.model.eval(), batch)["loss"].item() / len(rows)
    assert nats < 0.5 * np.log(2)


def test_a_vision_language_model_is_loaded_taught_with_adapters_and_asked(tmp_path):
    "The whole path of a hub model: a folder in its layout, LoRA, merged weights, answers."
    from PIL import Image

    model, processor = tiny_llava()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    model, processor = load_seeing(tmp_path / "base")
    rows = [
        {"id": c, "prompt": "Say:\n", "completion": label, "image": Image.new("RGB", (64, 48), c)}
        for c, label in (("red", "true"), ("blue", "false"))
    ]
    assert seen_answers(model, processor, rows, new=3) != ["true", "false"]
    lora = {"r": 8, "alpha": 16, "targets": "all-linear"}
    cfg = TrainConfig(max_steps=200, batch_size=2, lr=1e-2, lora=lora, device="cpu")
    student = merge_adapters(train(model, PictureSFT(processor), rows, cfg).model)
    for part in (student, processor):
        part.save_pretrained(tmp_path / "student")
    again = load_seeing(tmp_path / "student")
    assert seen_answers(*again, rows, new=3) == ["true", "false"]
    with pytest.raises(UserError, match="post blind"):
        seen_answers(*again, [{"id": "blind", "prompt": "Say:\n", "image": "nowhere.png"}])


def test_a_model_that_sees_nothing_is_refused(tmp_path):
    model, tokenizer = base_model()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "text")
    for source, what in (("text", "no vision-language model"), ("empty", "not a model")):
        (tmp_path / source).mkdir(exist_ok=True)
        with pytest.raises(UserError, match=what) as error:
            load_seeing(tmp_path / source)
        assert source in str(error.value)


def test_a_picture_of_a_row_that_does_not_open_is_named():
    _, processor = tiny_llava()
    row = {"id": "p9", "prompt": "x", "completion": "true", "image": "nowhere.png"}
    with pytest.raises(UserError, match="p9"):
        PictureSFT(processor).encode(row)


# --- the prior, the teacher, the students -----------------------------------------------------------------------------------------


def test_the_answers_of_a_reading_follow_from_its_prompt():
    r = rng("readings of a test")
    verdicts = Counter()
    for _ in range(300):
        prompt, questions = reading_row(r)
        asked = dict(questions)
        place, claim, reports = RuleTeacher().read(prompt)
        assert (asked["Place?"], asked["Claim?"]) == (place, claim)
        newest = next(((day, scene) for day, name, scene in reports if name == place), None)
        assert asked["News?"] == (f"day {newest[0]} {newest[1]}" if newest else "none")
        same = [a == b for a, b in zip(claim.split(), newest[1].split())] if newest else None
        said = [asked[name] for name in ("Number?", "Colour?", "Thing?", "All?")]
        names = {True: "yes", False: "no"}
        assert said == ([names[x] for x in (*same, all(same))] if newest else ["none"] * 4)
        assert not set(VERDICTS) & set(" ".join(asked.values()).split())
        verdicts[said[3]] += 1
    assert min(verdicts.values()) > 70


def test_only_the_answers_of_a_reading_are_learnt(tmp_path):
    tokenizer = load_mini_tokenizer()
    row = reading_row(rng("one reading"))
    item = Reading(tokenizer).encode(row)
    learnt = [i for i, label in zip(item["ids"], item["labels"]) if label != -100]
    assert tokenizer.decode(learnt).split() == " ".join(a for _, a in row[1]).split()
    assert all(label in (-100, i) for i, label in zip(item["ids"], item["labels"]))


def test_the_score_of_a_reading_is_one_where_the_model_is_certain():
    tokenizer = load_mini_tokenizer()
    row = reading_row(rng("another reading"))
    ids = Reading(tokenizer).encode(row)["ids"]

    class Knows(torch.nn.Module):
        def forward(self, input_ids):
            assert input_ids[0].tolist() == ids
            logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), len(tokenizer)).float()
            return type("Output", (), {"logits": logits})

    assert set(reading_scores(Knows(), tokenizer, [row]).values()) == {1.0}


def test_a_rule_that_reads_well_gives_label_and_reason(world):
    posts, store = world
    everything = sum(posts.values(), [])
    seen, evidence = seen_by_author(everything), EvidenceStore(store)
    rows, left_out = evidence_rows(everything, seen, evidence, RuleTeacher(0.0), k=4)
    assert left_out == 0
    assert [row.completion for row in rows] == [f"{p.label}. {p.reason}" for p in everything]


def test_a_rule_that_is_told_the_label_is_wrong_in_its_reasons_only(world):
    posts, store = world
    part = posts["train"]
    evidence = EvidenceStore(store)
    answers = {
        tell: [
            parse_answer(row.completion)
            for row in evidence_rows(
                part, seen_by_author(part), evidence, RuleTeacher(0.5), tell=tell
            )[0]
        ]
        for tell in (False, True)
    }
    right = {tell: [p.label == x for p, (x, _) in zip(part, a)] for tell, a in answers.items()}
    assert all(right[True]) and 0.45 < np.mean(right[False]) < 0.9
    good = [p.reason == reason for p, (_, reason) in zip(part, answers[True])]
    assert 0.3 < np.mean(good) < 0.8
    # the same prompts are misread, told or not
    own = [p.reason == reason for p, (_, reason) in zip(part, answers[False])]
    assert all(b for a, b in zip(own, good) if a)


def test_arms_differ_in_the_prompt_and_share_the_teacher(world):
    posts, store = world
    part, evidence = posts["train"][:12], EvidenceStore(store)
    seen = seen_by_author(part)

    def rows(arm):
        return student_rows({"arm": arm, "noise": 0.25, "k": 3}, part, seen, evidence)

    full = rows("full")
    for arm in ("no_evidence", "shuffled", "leak", "no_picture"):
        assert [r.completion for r in rows(arm)] == [r.completion for r in full]
        assert [r.prompt for r in rows(arm)] != [r.prompt for r in full]
    assert not any("Day" in row.prompt for row in rows("no_evidence"))
    assert not any("Sign:" in r.prompt or "Picture:" in r.prompt for r in rows("no_picture"))
    parts = {"sign_only": ("Picture:",), "caption_only": ("Sign:",), "picture_only": ("stand",)}
    for arm, hidden in parts.items():
        own = [row.prompt.split("\nDay")[0] for row in rows(arm)]  # without the evidence
        assert [row.completion for row in rows(arm)] == [r.completion for r in full]
        for word in ("Picture:", "Sign:", "stand"):
            assert any(word in prompt for prompt in own) is (word not in hidden)
    assert {row.completion for row in rows("label")} == set(VERDICTS)
    assert all(
        r.completion in VERDICTS and r.rationale == f.rationale
        for r, f in zip(rows("two_tasks"), full)
    )
    shuffled = view(POST_ARMS["shuffled"], part, seen, evidence)
    assert not set(shuffled) & {row.prompt for row in full}
    assert sorted("\n".join(shuffled).split("\n")) == sorted(
        "\n".join(r.prompt for r in full).split("\n")
    )
    assert "Fact check" in "".join(row.prompt for row in rows("leak"))
    assert "Fact check" not in "".join(row.prompt for row in full)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_NOTES_CACHE", str(tmp_path_factory.mktemp("cache")))
        seen = {"train": 6, "validation": 3, "test": 6, "pictures": 100, "epochs": 1}
        yield {
            "seen": seen,
            "prior": {"size": "xxs", "steps": 4, "rows": 60, "sentence_steps": 4},
            "steps": 2,
            "lr": 1e-3,
        }


def test_every_arm_trains_and_is_scored(tiny):
    students = Misinformation()
    found = students.run({arm: tiny | {"arm": arm} for arm in POST_ARMS}, [0], jobs=1)
    for arm, (metrics,) in found.items():
        right = unpack_bits(metrics["outcomes"], 6)
        assert np.mean(right) == pytest.approx(metrics["accuracy"])
        posts = PostsSeen().posts(PostsSeen().parameters(**tiny["seen"]))[0]["test"]
        labels = [(*VERDICTS, "")[int(digit)] for digit in metrics["labels"]]
        assert right == [label == post.label for post, label in zip(posts, labels)]
        assert ("dated: outcomes" in metrics) == (arm == "leak")
        assert ("texts" in metrics) == (arm not in ("start", "teacher"))
        assert len(json.dumps(metrics)) < 6000
    (valid,) = students.run({"v": tiny | {"arm": "leak", "score_on": "validation"}}, [0])["v"]
    assert len(valid["labels"]) == 3 and "dated: outcomes" not in valid


def test_a_run_that_makes_no_sense_is_refused(tiny):
    with pytest.raises(UserError, match="no arm 'psychic'"):
        Misinformation().parameters(arm="psychic", seed=0, **tiny)
    with pytest.raises(UserError, match="no set to score on"):
        Misinformation().parameters(arm="full", seed=0, score_on="train", **tiny)


def test_the_two_tasks_of_a_row_differ_in_the_last_words_of_the_prompt():
    row = two_task_row(TextRow("p", "Is it so?\nAnswer:\n", "true", "It was so."))
    assert row.pairs == (
        ("label", "Is it so?\nAnswer:\n", "true"),
        ("rationale", "Is it so?\nReason:\n", "It was so."),
    )


def test_the_likeliest_label_is_that_of_the_smallest_loss(tiny):
    model, tokenizer = PostPriors().load(PostPriors().parameters(**tiny["prior"]))
    prompt = "Is the post true, false or unverified?\nAnswer:\n"
    nats = {}
    for label in VERDICTS:
        ids = tokenizer.encode(prompt) + tokenizer.encode(label)
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(tokenizer.encode(prompt))
        nats[label] = -sum(logs[i - 1, ids[i]].item() for i in range(start, len(ids)))
    assert likeliest(model, tokenizer, [prompt]) == [min(nats, key=nats.get)]


def test_upper_layers_on_stored_states_learn_what_the_whole_model_would(world):
    "Loss and gradients of the last layer are those of the whole model."
    model, tokenizer = base_model()
    model.eval()
    items = [SFT(tokenizer).encode(row) for row in lora_rows(world)[:5]]
    body = model.base_model
    layers, norm = body.layers, body.norm

    def loss_and_gradients(method, rows):
        model.zero_grad()
        loss = method.loss_sums(model, method.collate(rows))["loss"]
        loss.backward()
        return loss.item(), [p.grad.clone() for p in layers[-1].parameters()]

    whole = loss_and_gradients(SFT(tokenizer), items)
    body.layers, body.norm = layers[:-1], torch.nn.Identity()
    states = states_of(body, [item["prompt"] + item["completion"] for item in items], batch_size=2)
    body.layers, body.norm = layers[-1:], norm
    upper = loss_and_gradients(
        StatesSFT(tokenizer), [item | {"states": x} for item, x in zip(items, states)]
    )
    assert upper[0] == pytest.approx(whole[0], rel=1e-5)
    for a, b in zip(whole[1], upper[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_prompts_with_a_shared_beginning_get_the_scores_that_they_have_alone(world):
    model, tokenizer = base_model()
    model.eval()
    prompts = [f"{'Look here. ' * 20}{row.prompt}" for row in lora_rows(world)[:4]]
    together = prompted_scores(model, tokenizer, prompts)
    alone = np.vstack([prompted_scores(model, tokenizer, [prompt]) for prompt in prompts])
    assert together.shape == (4, 3) and np.allclose(together, alone, atol=1e-4)


def test_a_pretrained_model_takes_the_place_of_the_student(tiny, tmp_path):
    "Labels are options, the first answers are written, and the lower layers stay what they were."
    model, tokenizer = PostPriors().load(PostPriors().parameters(**tiny["prior"]))
    save_model(model, tmp_path / "model", tokenizer)
    large = {"size": str(tmp_path / "model"), "upper": 1, "written": 2, "seen": tiny["seen"]}
    large |= {"steps": 2, "lr": 1e-3}
    cells = {arm: large | {"arm": arm} for arm in ("start", "full", "label", "no_evidence")}
    cells |= {n: large | {"arm": "teacher", "shots": n} for n in (0, 2)}
    found = {cell: m[0] for cell, m in Misinformation().run(cells, [0]).items()}
    for metrics in found.values():
        assert len(metrics["labels"]) == 6 and set(metrics["labels"]) <= set("012")
    assert {arm for arm, metrics in found.items() if "texts" in metrics} == {"full", "no_evidence"}
    assert len(unpack_bits(found["full"]["good_reasons"])) == 2
    # without solved posts the untrained model is asked what the start is asked
    assert found[0]["labels"] == found["start"]["labels"]
    assert "even: outcomes" in found[2]
    (valid,) = Misinformation().run({"v": large | {"arm": "full", "score_on": "validation"}}, [0])[
        "v"
    ]
    assert len(valid["labels"]) == 3 and "texts" not in valid
    with pytest.raises(UserError, match="two_tasks: labels of this model are options"):
        Misinformation().parameters(arm="two_tasks", seed=0, **large)


# --- real claims ------------------------------------------------------------------------------------------------------------------


def test_a_head_without_information_stays_at_the_floor():
    features = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=400)
    nothing, much = noise > 0, features[:, 0] + 0.3 * noise > 0
    floor = max(nothing.mean(), 1 - nothing.mean())
    assert folded(features, nothing.astype(int), 5, 0).mean() < floor + 0.05
    assert folded(features, much.astype(int), 5, 0).mean() > 0.85


def test_claims_that_are_not_here_or_not_known_are_named(monkeypatch, tmp_path):
    monkeypatch.delenv("KD_NOTES_DATA", raising=False)
    with pytest.raises(UserError, match="not here"):
        liar_rows()
    monkeypatch.setenv("KD_NOTES_DATA", str(tmp_path))
    row = {"claim": "It rains.", "justification": "It does.", "label": "sunny"}
    (tmp_path / "liar_plus_val.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="'sunny'"):
        liar_rows()


@pytest.mark.real_data
def test_the_real_claims_are_read():
    rows = liar_rows()
    assert len(rows) == 1284 and {row["label"] for row in rows} == set(RULINGS)
    assert all(row["claim"] for row in rows)
