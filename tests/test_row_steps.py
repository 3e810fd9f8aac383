"""Steps in front of a distillation: what comes out of them, and what stops them."""

import json

import pytest
from PIL import Image

from kd_notes.core import read_json, UserError
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.products import row_steps
from kd_notes.products.distill import distill

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


def run(teacher, out, step, rows=ROWS, objective="forward_kl", **more):
    return distill(rows, teacher, "layers:1", objective, out, rows=step, **QUICK | more)


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


def test_posts_become_instructions_with_evidence(teacher, tmp_path, capsys, monkeypatch):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    posts = [
        {"id": f"p{i}", "prompt": f"The bridge {i} is closed.", "response": label, "date": 10 + i}
        | ({"image": "a.png"} if i == 0 else {})
        for i, label in enumerate(["true", "false", "unverified"] * 2)
    ]
    file = tmp_path / "posts.jsonl"
    file.write_text("".join(json.dumps(post) + "\n" for post in posts))
    reports = [{"id": "e", "date": 3, "text": "The bridge 0 is closed for repairs."}]
    (tmp_path / "reports.jsonl").write_text("".join(json.dumps(r) + "\n" for r in reports))
    monkeypatch.setattr(
        row_steps.RowWork,
        "write",
        lambda self, prompts, stream="": ["true. The report says so." for _ in prompts],
    )
    step = "evidence:reports=reports.jsonl"
    run(teacher, tmp_path / "out", step, file, "sft")
    request = read_json(tmp_path / "out" / "request.json")
    assert set(request["files_sha256"]) == {"reports"}
    (tmp_path / "reports.jsonl").write_text(json.dumps(reports[0] | {"text": "Other."}) + "\n")
    with pytest.raises(UserError, match="another files_sha256"):
        run(teacher, tmp_path / "out", step, file, "sft")


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
        ("balanced:budget=0", {}, "budget"),
        ("balanced:budget=4,stages=2,polices=1", {}, "'polices' is no option"),
        ("select", {"objective": "sft"}, "asks the teacher about all rows"),
        ("select:part=1", {}, "'part' is no option"),
        ("evidence", {}, "no file of reports"),
        ("evidence:reports=nothing.jsonl", {}, "nothing.jsonl"),
        ("generate:batch_size=2", {}, "batch_size"),
        ("evidence:reports=nothing.jsonl,top=3", {}, "'top' is no option"),
    ],
)
def test_a_wrong_step_is_one_sentence(teacher, tmp_path, step, more, message):
    with pytest.raises(UserError, match=message):
        run(teacher, tmp_path / "a", step, **more)


def test_rows_without_a_domain_are_named(teacher, tmp_path):
    rows = [{key: row[key] for key in ("id", "prompt", "response")} for row in ROWS]
    with pytest.raises(UserError, match="the field 'domain' is missing"):
        run(teacher, tmp_path / "a", "balanced:budget=6,stages=2", rows)


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
