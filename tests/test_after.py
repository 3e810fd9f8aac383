"After the training: trackers, clean copies, the hub, a crate, a server. Real students, processes and HTTP; the hub is a stub."

import base64
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import TransformersServer
from typer.testing import CliRunner

from kd_notes.cli import app
from kd_notes.core import read_json, read_jsonl, sha256_file, to_jsonable, UserError
from kd_notes.data.task_file import OwnTask
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.models.pretrained import load_pretrained, weights_hash
from kd_notes.products.crate import command_of, run_crate, write_crate
from kd_notes.products.distill import distill
from kd_notes.products.request import deciding_settings, read_teachers
from kd_notes.products.settings import distill_settings, ON_POLICY, ON_POLICY_DEFAULTS
from kd_notes.products.share import export_student, public_files, push_student
from kd_notes.products.stepwise import stepwise
from kd_notes.products.stepwise_plan import stepwise_settings
from kd_notes.runner.profiles import plain_settings
from kd_notes.training.checkpoint import save_model

TOK = load_mini_tokenizer()
ROWS = [{"prompt": f"What is {n}?", "response": f"A number, {n}."} for n in range(12)]
QUICK = {"profile": "smoke", "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    "A folder with rows, a teacher, a student of distill, and files beside it that must stay."
    place = tmp_path_factory.mktemp("made")
    save_model(mini_model("causal", "s", len(TOK), seed=0), place / "teacher", TOK)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = QUICK | {"options": {"beta": 0.3}, "lr": 1e-3}
    pair = (str(place / "teacher"), "layers:2")
    distill(place / "rows.jsonl", *pair, "jsd", place / "student", **settings)
    (place / "student" / ".env").write_text("HF_TOKEN=mine")
    (place / "student" / "examples.jsonl").write_text(json.dumps(ROWS[0]))
    (place / "student" / "tracker").mkdir()
    (place / "student" / "tracker" / "events").write_text("rows")
    return place


def command(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_module_is_the_command():
    words = [sys.executable, "-m", "kd_notes.cli", "export", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0 and "kd-notes export" in done.stdout


# ---------------------------------------------------------------- trackers


class Rows:
    "A tracker of one's own; it fails at a row, if asked to."

    def __init__(self, fails_at: int | None = None):
        self.rows = []
        self.fails_at = fails_at

    def log(self, row, step):
        if len(self.rows) == self.fails_at:
            raise ConnectionError("the server went away\nwith a long story")
        self.rows.append((step, row))


@pytest.mark.parametrize("objective", ["forward_kl", "on_policy_kd"])
def test_a_tracker_gets_the_rows_of_a_distillation(made, tmp_path, objective):
    tracker = Rows()
    parts = (ROWS, str(made / "teacher"), "layers:1", objective)
    distill(*parts, tmp_path / "with", tracker=tracker, **QUICK)
    logged = read_jsonl(tmp_path / "with" / "metrics.jsonl")
    assert [step for step, _ in tracker.rows] == [row["step"] for row in logged]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert [row["loss"] for _, row in tracker.rows if "loss" in row] == losses
    # it decides nothing: the same weights, and the same request
    distill(*parts, tmp_path / "without", **QUICK)
    assert weights_hash(tmp_path / "with") == weights_hash(tmp_path / "without")
    assert read_json(tmp_path / "with" / "request.json") == read_json(
        tmp_path / "without" / "request.json"
    )


def test_a_tracker_that_fails_is_switched_off_and_the_others_go_on(made, tmp_path):
    broken, fine = Rows(fails_at=1), Rows()
    with pytest.warns(UserWarning, match="Rows is switched off.*ConnectionError: the server went"):
        distill(
            *(ROWS, str(made / "teacher"), "layers:1", "sft", tmp_path / "out"),
            tracker=[broken, fine],
            **QUICK,
        )
    assert (tmp_path / "out" / "report.json").is_file()
    steps = [row["step"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")]
    assert len(broken.rows) == 1 and [step for step, _ in fine.rows] == steps


def test_a_tracker_sees_every_trial_of_stepwise(tmp_path):
    words = ("red", "green")
    rows = [{"text": f"{words[i % 2]} thing {i}", "label": words[i % 2]} for i in range(24)]
    task = OwnTask("words", "Words", labels=words, template="{text}")
    tracker = Rows()
    quick = {"validation": 4.0, "test": 4.0, "max_steps": 2, "learning_rates": [1e-3, 1e-2]}
    options = {"arms": ["finetuning"], "widen": 0} | quick
    stepwise(task, rows, None, "mini:xxs", tmp_path / "out", tracker=tracker, **options)
    assert [step for step, row in tracker.rows if "loss" in row] == [1, 2] * 2
    assert [step for step, row in tracker.rows if "validation/loss" in row] == [1, 2] * 2


@pytest.mark.parametrize(
    "name, words", [("trackyo", "not a tracker"), ("comet_ml", "not installed"), (3, "no method")]
)
def test_a_tracker_that_cannot_be_is_named_before_the_training(made, tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        distill(
            ROWS, str(made / "teacher"), "layers:1", out=tmp_path / "out", tracker=name, **QUICK
        )
    assert not (tmp_path / "out").exists()


def test_a_tracker_by_its_name(made, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    parts = (ROWS, str(made / "teacher"), "layers:1", "forward_kl", tmp_path / "out")
    distill(*parts, tracker="trackio", **QUICK)
    assert (tmp_path / "out" / "report.json").is_file()
    assert [path for path in (tmp_path / "trackio").glob("*") if "kd_notes" in path.name]


# ---------------------------------------------------------------- a clean copy


def test_only_public_files_leave_and_shards_are_the_same_model(made, tmp_path):
    names = export_student(made / "student", tmp_path / "copy", "600KB")
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 2 and "model.safetensors.index.json" in names
    assert not {".env", ".lock", "examples.jsonl", "request.json", "tracker"} & set(names)
    (copy, _), (own, _) = load_pretrained(tmp_path / "copy"), load_pretrained(made / "student")
    assert weights_hash(copy) == weights_hash(own)
    ids = torch.tensor([TOK.encode("What is 3?")])
    assert torch.equal(copy.eval()(ids).logits, own.eval()(ids).logits)
    # and back into one file
    export_student(tmp_path / "copy", tmp_path / "one", "1GB")
    assert weights_hash(tmp_path / "one") == weights_hash(made / "student")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == [
        "model.safetensors"
    ]
    with pytest.raises(UserError, match="the folder exists"):
        export_student(made / "student", tmp_path / "copy")


def test_an_export_that_fails_leaves_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "forward-kl-is-my-secret")
    export_student(made / "student", tmp_path / "copy")
    (tmp_path / "copy" / "student.json").write_text('{"note": "forward-kl-is-my-secret"}')
    with pytest.raises(UserError, match="student.json: the file holds a secret") as caught:
        export_student(tmp_path / "copy", tmp_path / "other")
    assert "forward-kl" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    (tmp_path / "copy" / "work").mkdir()
    with pytest.raises(UserError, match="not finished"):
        public_files(tmp_path / "copy")
    with pytest.raises(UserError, match="no such folder"):
        public_files(tmp_path / "nowhere")


# ---------------------------------------------------------------- the hub


class HubStub(BaseHTTPRequestHandler):
    "The parts of the hub's interface that an upload uses; it stores every file of a commit."

    def log_message(self, *_):
        pass

    def answer(self, made: dict, status: int = 200) -> None:
        data = json.dumps(made).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self):
        oid = self.path.rpartition("/")[2]
        self.server.blobs[oid] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append(self.path)
        here = f"http://127.0.0.1:{self.server.server_port}"
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path.endswith("/repos/create"):
            self.server.created = json.loads(body)
            return self.answer({"url": f"{here}/me/student", "name": "me/student"})
        if self.path.endswith("/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            large = [name.endswith((".safetensors", ".png")) for name in names]
            modes = ["lfs" if one else "regular" for one in large]
            files = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in zip(names, modes)
            ]
            return self.answer({"files": files})
        if self.path.endswith("/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{here}/blob/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        for line in body.splitlines():
            found = json.loads(line)
            value = found["value"]
            if found["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            if found["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
        made = {"commitUrl": f"{here}/me/student/commit/abc", "commitOid": "abc", "success": True}
        return self.answer(made)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubStub)
    server.files, server.blobs, server.calls, server.created = {}, {}, [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    server.server_close()


def test_a_student_is_uploaded_and_loads_again(made, hub, tmp_path):
    before = sorted(made.iterdir())
    address = push_student(made / "student", "me/student", max_shard_size="600KB")
    assert address.endswith("/me/student") and hub.created["visibility"] == "private"
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    wanted = {path.name for path in public_files(made / "student")} - {"model.safetensors"}
    assert wanted < set(hub.files) and ".env" not in hub.files and "examples.jsonl" not in hub.files
    assert weights_hash(tmp_path) == weights_hash(made / "student")
    assert 'from_pretrained("me/student")' in hub.files["README.md"].decode()
    assert not any(b"hf_right" in data for data in hub.files.values())
    assert 'from_pretrained("student")' in (made / "student" / "README.md").read_text()
    assert sorted(made.iterdir()) == before  # nothing is left beside it


def test_one_command_distils_and_uploads(made, hub, tmp_path):
    words = ["distill", "--data", made / "rows.jsonl", "--teacher", made / "teacher"]
    words += ["--student", "layers:1", "--profile", "smoke", "--set", "device=cpu"]
    words += ["--out", tmp_path / "out", "--push-to-hub", "me/student"]
    done = command(*words)
    assert done.exit_code == 0, done.output
    assert hub.calls[0].endswith("/repos/create")
    assert hub.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "token, repo, words",
    [
        ("", "me/student", "the environment has no HF_TOKEN"),
        ("hf_wrong", "me/student", "hub repository me/student.*401"),
        ("hf_right", "me/too/many", "hub repository me/too/many"),
    ],
)
def test_what_the_hub_refuses_is_said_before_any_work(
    made, hub, tmp_path, monkeypatch, token, repo, words
):
    monkeypatch.setenv("HF_TOKEN", token)
    asked = ["distill", "--data", made / "rows.jsonl", "--teacher", made / "teacher"]
    done = command(*asked, "--out", tmp_path / "out", "--push-to-hub", repo)
    assert done.exit_code == 2
    assert re.search(words, " ".join(done.output.split())), done.output
    assert not (tmp_path / "out").exists() and not (token and token in done.output)


def test_a_hub_that_is_down_is_one_sentence(made, hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="hub repository me/student"):
        push_student(made / "student", "me/student")


# ---------------------------------------------------------------- the crate


def test_the_crate_describes_the_run(made):
    crate = read_json(write_crate(made / "student"))
    entities = {entity["@id"]: entity for entity in crate["@graph"]}
    assert len(entities) == len(crate["@graph"])

    def links(value):
        if isinstance(value, dict):
            return [value["@id"]] if set(value) == {"@id"} else []
        return [name for item in value for name in links(item)] if isinstance(value, list) else []

    used = {name for e in entities.values() for value in e.values() for name in links(value)}
    outside = {name for name in used - set(entities) if not name.startswith("http")}
    assert not outside
    run = entities["#run"]
    assert run["startTime"] <= run["endTime"] and entities[run["instrument"]["@id"]]["version"]
    results = [link["@id"] for link in run["result"]]
    assert all(entities[n]["sha256"] == sha256_file(made / "student" / n) for n in results)
    assert "model.safetensors" in results and "ro-crate-metadata.json" not in results
    assert entities["#data"]["identifier"] == sha256_file(made / "rows.jsonl")
    text = json.dumps(crate)
    assert str(made) not in text and os.uname().nodename not in text
    assert run_crate(made / "student") == crate  # it does not describe itself


LAB = "A Lab <https://lab.example>"


def test_a_crate_keeps_the_rules_of_its_profile(made):
    "What Process Run Crate 0.5 and RO-Crate 1.1 require and recommend, without their validator."
    graph = run_crate(made / "student", LAB)["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    assert all(entity["@type"] and entity["name"] for entity in graph[1:])
    about, root, run = entities["ro-crate-metadata.json"], entities["./"], entities["#run"]
    assert about["about"] == {"@id": "./"} and about["conformsTo"]["@id"].endswith("/crate/1.1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", root["datePublished"]) and root["description"]
    for link in (root["license"], root["conformsTo"]):
        assert entities[link["@id"]]["@type"] == "CreativeWork"
    assert root["mentions"] == {"@id": "#run"}
    files = {name for name, entity in entities.items() if entity["@type"] == "File"}
    assert {link["@id"] for link in root["hasPart"]} == files
    assert all((made / "student" / name).is_file() for name in files)
    software = [entity for entity in graph if entity["@type"] == "SoftwareApplication"]
    assert {entity["name"] for entity in software} >= {"kd_notes", "python", "torch"}
    for entity in software:
        assert entity["url"] == entity["@id"] and entity["url"].startswith("http"), entity
        assert entity["version"] and "softwareVersion" not in entity, entity
    assert entities[run["instrument"]["@id"]]["name"] == "kd_notes"
    assert run["actionStatus"] == "http://schema.org/CompletedActionStatus"
    assert run["object"] and run["result"] and run["description"]
    assert run["agent"] == root["author"] == root["publisher"] == {"@id": "https://lab.example"}
    lab = {"@id": "https://lab.example", "@type": "Organization", "name": "A Lab"}
    assert entities["https://lab.example"] == lab | {"url": "https://lab.example"}


def test_a_crate_names_nobody_unasked(made):
    graph = run_crate(made / "student")["@graph"]
    assert not {"agent", "author", "publisher"} & {key for entity in graph for key in entity}
    assert not [entity for entity in graph if entity["@type"] in ("Person", "Organization")]


@pytest.mark.parametrize("text", ["A Lab", "<https://lab.example>", "A Lab <lab>", ""])
def test_an_organization_has_a_name_and_an_address(made, text):
    failed = command("crate", str(made / "student"), "--organization", text)
    assert failed.exit_code == 2 and "A Lab <https://lab.example>" in failed.output


def test_a_crate_has_the_address_of_this_project(made):
    settings = (Path(__file__).parent.parent / "settings.ini").read_text()
    [home] = re.findall(r"^git_url = (.*)$", settings, re.M)
    graph = run_crate(made / "student")["@graph"]
    assert [entity["url"] for entity in graph if entity.get("name") == "kd_notes"] == [home]


def contexts_of_crates(cache: Path) -> None:
    "Fill the validator's cache with the contexts, as the library of RO-Crate brings them."
    rocrate = pytest.importorskip("rocrate")
    requests_cache = pytest.importorskip("requests_cache")
    file = Path(rocrate.__file__).parent / "data" / "ro-crate.jsonld"
    run_terms = {"@context": {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"}}
    contexts = {
        "https://w3id.org/ro/crate/1.1/context": read_json(file),
        "https://w3id.org/ro/terms/workflow-run/context": run_terms,
    }
    session = requests_cache.CachedSession(str(cache), backend="sqlite", expire_after=-1)
    for url, context in contexts.items():
        request = requests_cache.CachedRequest(method="GET", url=url)
        answer = {
            "url": url,
            "status_code": 200,
            "headers": {"Content-Type": "application/ld+json"},
        }
        session.cache.save_response(
            requests_cache.CachedResponse(
                request=request, content=json.dumps(context).encode(), **answer
            )
        )
    session.close()


@pytest.mark.parametrize("lab, unmet", [(LAB, set()), (None, {"agent", "author", "publisher"})])
def test_the_validator_of_ro_crate_accepts_it(made, tmp_path, lab, unmet):
    "What is required, and what is recommended but for the names that nobody gave."
    services = pytest.importorskip("rocrate_validator.services")
    contexts_of_crates(tmp_path / "contexts")
    write_crate(made / "student", lab)
    settings = services.ValidationSettings(
        rocrate_uri=made / "student",
        profile_identifier="process-run-crate",
        requirement_severity="RECOMMENDED",
        offline=True,
        cache_path=tmp_path / "contexts",
    )
    issues = services.validate(settings).get_issues()
    found = {str(issue.violatingProperty).rpartition("/")[2] for issue in issues}
    assert found == unmet, [issue.message for issue in issues]


def test_the_command_of_a_crate_makes_the_same_request(made):
    report = read_json(made / "student" / "report.json")
    words = command_of(report, "student")
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert deciding_settings(distill_settings(**plain_settings(sets))) == report["settings"]
    assert words[:4] == ["kd-notes", "distill", "--data", "rows.jsonl"]


@pytest.mark.parametrize(
    "objective, teachers, given",
    [
        ("gkd", ["hub:a=0.7", "hub:b=0.3"], {"lr": 5e-4}),
        ("minillm", ["law=hub:a", "art=hub:b"], {"route": "domain"}),
        ("forward_kl", ["hub:a", "hub:b", "hub:c"], {}),
    ],
)
def test_the_command_of_a_crate_names_each_teacher_and_the_rate(objective, teachers, given):
    group = read_teachers(teachers, None, given.get("route"))
    defaults = ON_POLICY_DEFAULTS if objective in ON_POLICY else {}
    settings = distill_settings(**defaults | given)
    report = {"data": "rows.jsonl", "teacher": str(group), "teacher_options": group.options()}
    report |= {"student": "hub:s", "objective": objective, "corpus_sha256": "0"}
    words = command_of(report | {"settings": deciding_settings(settings)}, "student")
    said = [(words[i], words[i + 1]) for i in range(2, len(words), 2)]
    read = read_teachers(
        [value for name, value in said if name == "--teacher"], None, settings.route
    )
    assert (read.sources, read.weights, read.names) == (group.sources, group.weights, group.names)
    sets = plain_settings([value for name, value in said if name == "--set"])
    assert distill_settings(**defaults | sets) == settings
    assert ("--corpus", "corpus") in said


def test_the_rates_of_a_crate_can_be_given_to_stepwise():
    settings = stepwise_settings(learning_rates=[1e-3, 1e-2])
    report = {"arms": {}, "task": {"name": "nli"}, "rationales": None, "test": None}
    report |= {"student": "mini", "settings": to_jsonable(deciding_settings(settings))}
    words = command_of(report, "out")[1:]
    taken = command(*words, "--set", "validation=-1")  # the rates are read, and then this is wrong
    assert taken.exit_code == 2 and "validation" in taken.output, taken.output
    twice = command(*words, "--learning-rate", "0.1")
    assert twice.exit_code == 2 and "rates to search, and one" in twice.output


def test_the_library_of_ro_crate_reads_it(made):
    rocrate = pytest.importorskip("rocrate.rocrate")
    write_crate(made / "student")
    crate = rocrate.ROCrate(made / "student")
    action = crate.dereference("#run")
    assert action.type == "CreateAction" and action["instrument"]["name"] == "kd_notes"
    assert {file.id for file in action["result"]} == {
        e.id for e in crate.data_entities if e.type == "File"
    }
    assert crate.root_dataset["conformsTo"].id.endswith("/process/0.5")


def test_a_folder_without_a_report_has_no_crate(made):
    with pytest.raises(UserError, match="no report of a run"):
        write_crate(made / "teacher")


# ---------------------------------------------------------------- a server


def test_transformers_serves_an_exported_student(made, tmp_path):
    "A real process answers a real request with the student's own words."
    export_student(made / "student", tmp_path / "served", "600KB")
    server = TransformersServer(tmp_path / "served").ready()
    try:
        chat = [{"role": "user", "content": "What is 3?"}]
        asked = {"model": server.folder, "messages": chat, "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"{server.url}/chat/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answered:
            text = json.load(answered)["choices"][0]["message"]["content"]
    finally:
        server.kill()
    model, tokenizer = load_pretrained(made / "student")
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made_here = model.eval().generate(**ids, max_new_tokens=8, do_sample=False)
    own = tokenizer.decode(made_here[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == own
