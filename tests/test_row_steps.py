"""Steps in front of a distillation: what comes out of them, and what stops them."""

import json
import math
import sys

import pytest
from helpers import tiny_llava
from PIL import Image
from typer.testing import CliRunner

from kd_notes.cli import app
from kd_notes.core import append_jsonl, read_json, UserError
from kd_notes.methods.evidence import load_seeing, seen_answers
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.products import row_steps
from kd_notes.products.distill import distill
from kd_notes.training.checkpoint import save_model

QUICK = {"max_steps": 2, "max_new_tokens": 6, "batch_size": 2, "device": "cpu", "validation": 2}
ROWS = [
    {"id": f"r{i}", "prompt": f"Is {i} even?", "response": "no" if i % 2 else "yes"}
    | {"domain": "small" if i < 8 else "large"}
    for i in range(10)
]


@pytest.fixture(scope="module")
def teacher():
    tok = load_mini_tokenizer()
    return mini_model("causal", "xs", len(tok), seed=0), tok


POSTS = [
    {"id": f"p{i}", "prompt": f"The bridge {i} is closed.", "response": label, "date": 10 + i}
    for i, label in enumerate(["true", "false", "unverified"] * 8)
]
REPORTS = [{"id": "e", "date": 3, "text": "The bridge 0 is closed for repairs."}]


@pytest.fixture
def posts(tmp_path):
    "The path of a file of posts, one with a picture, beside reports.jsonl."
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    append_jsonl(tmp_path / "posts.jsonl", [POSTS[0] | {"image": "a.png"}, *POSTS[1:]])
    append_jsonl(tmp_path / "reports.jsonl", REPORTS)
    return tmp_path / "posts.jsonl"


def run(teacher, out, step, rows=ROWS, objective="forward_kl", **more):
    return distill(rows, teacher, "layers:1", objective, out, rows=step, **QUICK | more)


def by_command(data, words, settings):
    "Call `kd-notes distill` on a file, with a teacher beside it; return what it says."
    teacher, out = data.parent / "teacher", data.parent / "out"
    command = ["distill", "--data", data, "--teacher", teacher, "--student", "layers:1"]
    command += ["--out", out, *words.split()]
    for name, value in (QUICK | settings).items():
        command += ["--set", f"{name}={value}"]
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    return done.output


ATKD_PART = '{"divergence": "atkd", "options": {"reverse": true}}'


@pytest.mark.parametrize(
    "words, said",
    [
        ("--objective akl", {"options": '{"boundary": "crossing-in-head"}'}),
        ("--objective akl", {"sft_weight": "0.91"}),
        ("--objective atkd", {"options": '{"reverse": true, "hard_fraction": 0.7}'}),
        ("--objective gkd", {"options": '{"parts": [' + ATKD_PART + "]}"}),
        ("--objective symmetric_cross_entropy", {"options": '{"alpha": 0.1, "beta": 1.0}'}),
        ("--rows generate:batches=1,batch_size=4 --objective symmetric_cross_entropy", {}),
        ("--objective label_revision", {"options": '{"eta": 0.9, "who": "wrong"}'}),
        ("--rows select:share=0.5 --objective label_revision", {"temperature": "2.0"}),
        ("--rows paraphrase:copies=2", {}),
        ("--rows balanced:budget=6,stages=2,policy=none,label_filter=no --objective seqkd", {}),
        ("--rows evidence:reports=reports.jsonl --objective sft", {}),
    ],
)
def test_each_method_is_a_command(teacher, tmp_path, posts, monkeypatch, words, said):
    "The commands of the lessons, on a file of rows; a second call finds the student."
    save_model(teacher[0], tmp_path / "teacher", teacher[1])
    data = posts
    if "evidence" in words:
        monkeypatch.setattr(row_steps.RowWork, "write", says("true. So it is."))
    else:
        data = tmp_path / "rows.jsonl"
        append_jsonl(data, ROWS)
    assert "the student is in" in by_command(data, words, said)
    report = read_json(tmp_path / "out" / "report.json")
    assert report["steps"] == 2 and report["rows"] >= (1 if "budget" in words else 8)
    student = report["results"]["student"]["nll"]
    assert math.isfinite(student) and student != report["results"]["untrained"]["nll"]
    assert report["settings"]["options"] == json.loads(said.get("options", "{}"))
    if "--rows" in words:
        assert report["settings"]["rows"] == words.split()[1]
    assert "finished already" in by_command(data, words, said)


def test_paraphrases_come_beside_the_rows_and_keep_their_completions(
    teacher, tmp_path, monkeypatch
):
    kept = {}
    monkeypatch.setattr(row_steps, "write_json", lambda file, made: kept.update({file.name: made}))
    report = run(teacher, tmp_path / "a", "paraphrase:copies=2")
    made = kept["rows.json"][0]
    assert report["rows"] == len(made) > 8
    answers = {row["id"]: row["completion"] for row in made[:8]}
    assert all(row["completion"] == answers[row["id"].split("-said-")[0]] for row in made[8:])


def test_a_budget_of_calls_is_kept(teacher, tmp_path, capsys):
    report = run(teacher, tmp_path / "a", "balanced:budget=6,stages=2,label_filter=false")
    assert "6 calls of the teacher" in capsys.readouterr().out
    assert 1 <= report["rows"] <= 6


def test_selected_rows_alone_learn_from_the_teacher(teacher, tmp_path, capsys):
    half = run(teacher, tmp_path / "a", "select:share=0.5")
    assert "4 of 8 rows learn from the teacher" in capsys.readouterr().out
    whole = run(teacher, tmp_path / "b", "select:share=1.0")
    plain = distill(ROWS, teacher, "layers:1", "forward_kl", tmp_path / "c", **QUICK)
    assert half["rows"] == whole["rows"] == plain["rows"] == 8
    student = [report["results"]["student"] for report in (half, whole, plain)]
    assert student[1] == student[2] != student[0]


def test_generated_rows_have_the_labels_of_the_given_ones(teacher, tmp_path):
    step = "generate:batches=1,batch_size=4,study_every=1"
    report = run(teacher, tmp_path / "a", step)
    assert 8 < report["rows"] <= 8 + 2 * 4


def test_the_examples_of_a_generated_row_are_of_different_labels(teacher, tmp_path, monkeypatch):
    asked = []

    def write(self, prompts, stream="", chat=True):
        asked.extend(prompts)
        return [f"Is {stream} {place} odd?" for place in range(len(prompts))]

    monkeypatch.setattr(row_steps.RowWork, "write", write)
    rows = sorted(ROWS, key=lambda row: row["response"])  # all of one label first
    rows[0] = rows[0] | {"prompt": "Is 0\n\neven?"}
    run(teacher, tmp_path / "a", "generate:batches=1,batch_size=4,study_every=1", rows, "sft")
    shown = [line for line in asked[0].split("\n") if line]
    assert [line.split(":")[0] for line in shown] == ["no", "yes", "no", "no"]


def test_a_killed_generation_goes_on_to_the_same_rows(teacher, tmp_path, monkeypatch):
    "Of a round that was written down nothing is asked again."
    streams = []

    def write(self, prompts, stream="", chat=True):
        if stream == "validation 2" and streams.count(stream) == 0:
            streams.append(stream)
            raise KeyboardInterrupt
        streams.append(stream)
        return [f"Is {stream} {sum(map(ord, prompt))} odd?" for prompt in prompts]

    monkeypatch.setattr(row_steps.RowWork, "write", write)
    step = "generate:batches=4,batch_size=4,study_every=2,show_every=1"
    with pytest.raises(KeyboardInterrupt):
        run(teacher, tmp_path / "a", step, objective="symmetric_cross_entropy")
    before = len(streams)
    stopped = run(teacher, tmp_path / "a", step, objective="symmetric_cross_entropy")
    kinds = [(kind, number) for number in (2, 3) for kind in ("train", "validation")]
    assert streams[before:] == [f"{kind} {number}" for kind, number in kinds]
    whole = run(teacher, tmp_path / "b", step, objective="symmetric_cross_entropy")
    assert stopped["rows"] == whole["rows"] == 8 + 4 * 8
    assert stopped["results"] == whole["results"]


def says(text, asked=None, most=10**9):
    "A teacher that writes this, and keeps what it was asked; it is interrupted after `most`."

    def write(self, prompts, stream="", chat=True):
        if asked is not None:
            asked.extend(prompts)
            if len(asked) > most:
                raise KeyboardInterrupt
        return [text] * len(prompts)

    return write


def test_posts_become_instructions_with_evidence(teacher, tmp_path, posts, monkeypatch):
    kept = {}
    inner = row_steps.write_json
    monkeypatch.setattr(
        row_steps,
        "write_json",
        lambda file, made: (kept.update({file.name: made}), inner(file, made)),
    )
    monkeypatch.setattr(row_steps.RowWork, "write", says("true. The report says so."))
    step = "evidence:reports=reports.jsonl"
    run(teacher, tmp_path / "out", step, posts, "sft")
    train, held_out = kept["rows.json"]
    made = {row["id"]: row for row in train + held_out}
    assert len(made) == 24 and len(held_out) == 2
    prompt = made["p3"]["prompt"][0]["content"]
    assert "Post of day 13: The bridge 3 is closed." in prompt and "Day 3: The bridge 0" in prompt
    # the label is the row's, which the teacher was told
    assert made["p4"]["completion"] == "false. The report says so."
    request = read_json(tmp_path / "out" / "request.json")
    assert set(request["files_sha256"]) == {"reports", "pictures"}
    append_jsonl(tmp_path / "reports.jsonl", [REPORTS[0] | {"id": "f", "text": "Other."}])
    with pytest.raises(UserError, match="another files_sha256"):
        run(teacher, tmp_path / "out", step, posts, "sft")


@pytest.fixture
def captioned(posts):
    "The same file with a caption beside the image of p1, and beside no image of p2."
    lines = [json.loads(line) for line in posts.read_text().splitlines()]
    lines[1] |= {"image": "a.png", "caption": "Two boats at a pier."}
    lines[2] |= {"caption": "A closed gate."}
    posts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return posts


def picture_lines(asked):
    "{number of the post: its caption in what the teacher was asked}."
    told = [prompt for prompt in asked if "\nPicture: " in prompt]
    numbers = [int(prompt.split("The bridge ")[1].split()[0]) for prompt in told]
    texts = [prompt.split("\nPicture: ")[1].split("\n")[0] for prompt in told]
    return dict(zip(numbers, texts))


def test_images_are_described_by_a_model_of_the_users_choice(
    teacher, tmp_path, captioned, monkeypatch, capsys
):
    "A captioner with random weights; a caption that is given stays as it is."
    for part in tiny_llava():
        part.save_pretrained(tmp_path / "sees")
    asked = []
    monkeypatch.setattr(row_steps.RowWork, "write", says("true. So it is.", asked))
    step = f"evidence:reports=reports.jsonl,captioner={tmp_path / 'sees'}"
    assert run(teacher, tmp_path / "out", step, captioned, "sft")["rows"] == 22
    row = {"id": "p0", "prompt": row_steps.DESCRIBE, "image": tmp_path / "a.png"}
    (said,) = seen_answers(*load_seeing(tmp_path / "sees"), [row], new=32)
    given = {1: "Two boats at a pier.", 2: "A closed gate."}
    assert said.strip() and picture_lines(asked) == {0: " ".join(said.split())} | given
    assert "without a caption" not in capsys.readouterr().out


def test_an_image_without_a_caption_is_counted_in_one_line(
    teacher, tmp_path, captioned, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(row_steps.RowWork, "write", says("true. So it is.", asked))
    run(teacher, tmp_path / "out", "evidence:reports=reports.jsonl", captioned, "sft")
    assert picture_lines(asked) == {1: "Two boats at a pier.", 2: "A closed gate."}
    lines = [line for line in capsys.readouterr().out.splitlines() if "without a caption" in line]
    assert len(lines) == 1 and "1 image stays" in lines[0] and "captioner=" in lines[0]


def test_a_captioner_that_sees_nothing_is_told_before_anything(teacher, tmp_path, posts):
    save_model(teacher[0], tmp_path / "reads", teacher[1])
    step = f"evidence:reports=reports.jsonl,captioner={tmp_path / 'reads'}"
    with pytest.raises(UserError, match="reads: this is no vision-language model"):
        run(teacher, tmp_path / "out", step, posts, "sft")
    assert not (tmp_path / "out" / "request.json").exists()


def test_a_finished_folder_is_not_that_of_another_picture(teacher, tmp_path, posts, monkeypatch):
    step = "evidence:reports=reports.jsonl,tell=no"
    monkeypatch.setattr(row_steps.RowWork, "write", says("true. So it is."))
    run(teacher, tmp_path / "out", step, posts, "sft")
    run(teacher, tmp_path / "out", step, posts, "sft")
    Image.new("RGB", (64, 64), "black").save(tmp_path / "a.png")
    with pytest.raises(UserError, match="with another files_sha256"):
        run(teacher, tmp_path / "out", step, posts, "sft")


def test_a_killed_search_for_evidence_asks_for_no_verdict_twice(
    teacher, tmp_path, posts, monkeypatch
):
    step, asked, later = "evidence:reports=reports.jsonl,tell=no", [], []
    monkeypatch.setattr(row_steps.RowWork, "write", says("true. So it is.", asked, most=16))
    with pytest.raises(KeyboardInterrupt):
        run(teacher, tmp_path / "out", step, posts, "sft")
    monkeypatch.setattr(row_steps.RowWork, "write", says("false. So it is.", later))
    report = run(teacher, tmp_path / "out", step, posts, "sft")
    assert len(asked[:16] + later) == len(set(asked[:16] + later)) == 24
    assert report["rows"] + report["held_out"] == 24


@pytest.mark.parametrize(
    "change, message",
    [
        ({"date": None}, "posts.jsonl:6: the field 'date' is missing"),
        ({"date": "2026-03-12"}, "'2026-03-12' cannot be compared"),
        ({"response": "mostly true"}, "posts.jsonl:6: there is no label 'mostly true'"),
        ({"image": "nothing.png"}, "posts.jsonl:6, .*nothing.png: the image does not open"),
        ({"image": "posts.jsonl"}, "posts.jsonl:6, .*: the image does not open"),
        ({"caption": ["boats"]}, "posts.jsonl:6: the caption .* is not a text"),
    ],
)
def test_a_post_that_cannot_be_used_is_named_and_its_correction_needs_no_other_folder(
    teacher, tmp_path, posts, monkeypatch, change, message
):
    monkeypatch.setattr(row_steps.RowWork, "write", says("true. So it is."))
    good = posts.read_text().splitlines(True)
    wrong = json.dumps(POSTS[5] | change) + "\n"
    posts.write_text("".join([*good[:5], wrong, *good[6:]]))
    step = "evidence:reports=reports.jsonl"
    with pytest.raises(UserError, match=message):
        run(teacher, tmp_path / "out", step, posts, "sft")
    assert not [file for file in (tmp_path / "out").iterdir() if file.name != ".lock"]
    posts.write_text("".join(good))
    assert run(teacher, tmp_path / "out", step, posts, "sft")["rows"] == 22


@pytest.mark.parametrize("library", ["rapidocr", "bm25s"])
def test_a_missing_library_of_a_step_is_named_before_anything(
    teacher, tmp_path, posts, monkeypatch, library
):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"{library} is not installed.*mmidr"):
        run(teacher, tmp_path / "out", "evidence:reports=reports.jsonl", posts, "sft")
    assert not (tmp_path / "out" / "request.json").exists()


def test_a_killed_step_goes_on_without_asking_twice(teacher, tmp_path, monkeypatch):
    asked = []

    def write(self, prompts, stream="", chat=True):
        asked.extend(prompts)
        if len(asked) > 16:
            raise KeyboardInterrupt
        return [f"said {prompt[-9:]}" for prompt in prompts]

    monkeypatch.setattr(row_steps.RowWork, "write", write)
    rows = [
        row | {"id": f"{row['id']}-{n}", "prompt": f"{n} {row['prompt']}"}
        for n in range(3)
        for row in ROWS
    ]
    with pytest.raises(KeyboardInterrupt):
        run(teacher, tmp_path / "a", "paraphrase", rows)
    first = list(asked[:16])
    asked[:] = []
    monkeypatch.setattr(
        row_steps.RowWork,
        "write",
        lambda self, prompts, stream="", chat=True: (
            asked.extend(prompts),
            ["again"] * len(prompts),
        )[1],
    )
    run(teacher, tmp_path / "a", "paraphrase", rows)
    assert asked and not set(asked) & set(first)


@pytest.mark.parametrize(
    "step, more, message",
    [
        ("balance", {}, "no step 'balance'"),
        ("balanced", {}, "budget"),
        ("balanced:budget=0", {}, "setting budget: 0 is not a whole number from 5"),
        ("balanced:budget=6,policy=fair", {}, "policy: 'fair' is not known"),
        ("balanced:budget=4,stages=2,polices=1", {}, "'polices' is no option"),
        ("select", {"objective": "sft"}, "asks the teacher about all rows"),
        ("select:part=1", {}, "'part' is no option"),
        ("evidence", {}, "evidence needs reports"),
        ("evidence:reports=reports.jsonl,k=-1", {}, "setting k: -1 is not a whole number"),
        ("evidence:reports=reports.jsonl,tell=maybe", {}, "setting tell: 'maybe'"),
        ("evidence:reports=reports.jsonl,first=end", {}, "first: 'end' is not known"),
        ("evidence:reports=reports.jsonl,captioner=eyes", {}, "'eyes' is not a model"),
        ("paraphrase:copies=0", {}, "copies"),
        ("select:share=2", {}, "share: 2 is not a share"),
        ("evidence:reports=nothing.jsonl", {}, "nothing.jsonl"),
        ("generate:batch_size=2", {}, "batch_size"),
        ("evidence:reports=nothing.jsonl,top=3", {}, "'top' is no option"),
        ("generate:batches=0", {}, "batches"),
        ("generate:feedback=best", {}, "'best' is not known"),
        ("select:share=half", {}, "'half' .str. is not a number"),
        ("select:share=0", {"sft_weight": 0.0}, "nothing to learn"),
        ("paraphrase:copies=4", {}, "at most 3"),
    ],
)
def test_a_wrong_step_is_one_sentence(teacher, tmp_path, step, more, message):
    with pytest.raises(UserError, match=message):
        run(teacher, tmp_path / "a", step, **more)
    assert not (tmp_path / "a").exists()  # so that the corrected call may use it


def test_rows_without_a_domain_are_named(teacher, tmp_path):
    rows = [{key: row[key] for key in ("id", "prompt", "response")} for row in ROWS]
    with pytest.raises(UserError, match="the field 'domain' is missing"):
        run(teacher, tmp_path / "a", "balanced:budget=6,stages=2", rows)
    assert not (tmp_path / "a" / "request.json").exists()


@pytest.mark.parametrize("step", ["generate", "balanced:budget=6"])
def test_a_step_that_trains_is_refused_in_a_launch_of_several_processes(
    teacher, tmp_path, monkeypatch, step
):
    "One process alone would wait for the others forever."
    for name, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="trains in one process"):
        run(teacher, tmp_path / "a", step)
    assert not (tmp_path / "a").exists()
