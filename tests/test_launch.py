"""Commands under torchrun and accelerate launch: two gloo processes equal one, one writes, a lost process is started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TOML
from safetensors.torch import load_file

from kd_notes.core import read_json, read_jsonl, stable_hash, UserError
from kd_notes.methods.on_policy import minibatch_config
from kd_notes.methods.taid import TAID, TAIDConfig
from kd_notes.models.mini import load_mini_tokenizer, mini_model
from kd_notes.products.distill import distill
from kd_notes.products.stepwise import stepwise
from kd_notes.training.checkpoint import save_model
from kd_notes.training.loop import train
from kd_notes.training.processes import (
    check_shared_folder,
    by_main,
    lost_process,
    main_process,
    processes,
    shared_batch,
)

CONFIG = Path(__file__).parent.parent / "configs" / "cpu.yaml"
LAUNCHED = {
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
    "KD_NOTES_PROGRESS": "off",
}
QUICK = {
    "device": "cpu",
    "max_steps": 4,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "validation": 4,
    "evaluations": 2,
    "max_new_tokens": 5,
    "lr": 1e-3,
}
STEPS = {
    "device": "cpu",
    "max_steps": 6,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "evaluations": 2,
    "learning_rates": (1e-3,),
    "arms": ("step_by_step",),
    "widen": 0,
}
KINDS = {
    "minillm": ("minillm", False),
    "minillm_fsdp": ("minillm", True),
}


def distilled(place: Path, kind: str, name: str) -> dict:
    objective, fsdp = KINDS[kind]
    models = (str(place / "teacher"), str(place / "student"))
    options = QUICK | {"fsdp": fsdp and processes() > 1}
    return distill(place / "rows.jsonl", *models, objective, place / f"{kind}-{name}", **options)


def stepped(place: Path, name: str, fsdp: bool = False) -> dict:
    options = STEPS | {"fsdp": fsdp}
    return stepwise(
        place / "task.toml", place / "things.jsonl", None, "mini", place / name, **options
    )


def stop_at(step: int):
    def validate(model):
        if len(validate.calls) == step:
            raise KeyboardInterrupt
        validate.calls.append(step)
        return {"score": 0.0}

    validate.calls = []
    return validate


def taid_cut(place: Path, name: str) -> None:
    "Run TAID as a whole, and cut and resumed; its t depends on the losses of all processes."
    tokenizer, ends = load_mini_tokenizer(), []
    prompts = [f"Name thing number {i}." for i in range(24)]
    rows = [
        {"id": p, "prompt": p, "completion": "red" + " red" * (i % 5)}
        for i, p in enumerate(prompts)
    ]
    cfg = minibatch_config(4, 8, 1e-3, log_every=1, save_every=3, eval_every=1, device="cpu")
    for folder, stops in (("whole", 99), ("cut", 4), ("cut", 99)):
        student, teacher = (mini_model("causal", "xxs", len(tokenizer), seed=k) for k in (0, 1))
        settings = TAIDConfig(rollouts=4, max_new_tokens=8, pace=0.9, momentum=0.5)
        method = TAID(tokenizer, teacher, settings)
        run_dir = place / f"taid-{name}" / folder
        try:
            train(student, method, rows, cfg, run_dir=run_dir, validate=stop_at(stops))
        except KeyboardInterrupt:
            continue
        weights = torch.cat([p.detach().flatten() for p in student.parameters()])
        ends.append(
            {"t": method.t, "loss": method.last_loss, "weights": stable_hash(weights.tolist())}
        )
    rank = os.environ.get("RANK", "0")
    (place / f"taid-{name}" / f"ends-{rank}.json").write_text(json.dumps(ends))


def all_kinds(place: Path, name: str) -> None:
    "What one process does, and each of two."
    distilled(place, "minillm", name)
    stepped(place, f"stepwise-{name}")
    taid_cut(place, name)
    if name == "two":
        report = distilled(place, "minillm_fsdp", name)
        assert bool(report) == main_process()
        assert bool(distilled(place, "minillm_fsdp", name)) == main_process()
        stepped(place, "stepwise_fsdp-two", fsdp=True)
        own = place / f"of process {os.environ['RANK']}"
        own.mkdir()
        with pytest.raises(UserError, match="process 1 does not see"):
            check_shared_folder(own)
        with pytest.raises(UserError, match="broken by the first"):
            by_main(broken)


def broken():
    raise UserError("broken by the first", fix="Mend it.")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Tiny models and rows; everything trained by one process, and by two that torchrun starts."
    folder = tmp_path_factory.mktemp("launch")
    tokenizer = load_mini_tokenizer()
    for name, size, seed in (("student", "xs", 0), ("teacher", "s", 1)):
        save_model(mini_model("causal", size, len(tokenizer), seed=seed), folder / name, tokenizer)
    things = [("brick", "red"), ("leaf", "green")]
    texts, questions = [], []
    for i in range(40):
        thing, colour = things[i % 2]
        row = {
            "id": f"r{i}",
            "prompt": f"Name {thing} number {i}.",
            "completion": f" It is {colour}.",
        }
        texts.append(row)
        why = f"A {thing} is {colour}."
        questions.append(
            {"id": f"q{i}", "thing": f"{thing} {i}", "colour": colour, "rationale": why}
        )
    for file, rows in (("rows", texts), ("things", questions)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.toml").write_text(TOML)
    all_kinds(folder, "one")
    program = folder / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from pathlib import Path; import test_launch\n"
        f"test_launch.all_kinds(Path({str(folder)!r}), 'two')\n"
    )
    done = subprocess.run(
        [*torchrun(), str(program)], env=os.environ | LAUNCHED, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "said.txt").write_text(done.stdout)
    return folder


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]


def differences(one: Path, two: Path) -> float:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("name", ["one", "two"])
def test_taid_on_several_processes_goes_on_from_a_checkpoint_as_if_nothing_had_happened(
    place, name
):
    ends = [
        read_json(place / f"taid-{name}" / f"ends-{k}.json") for k in range(1 + (name == "two"))
    ]
    whole = ends[0][0]
    assert 0.4 < whole["t"] < 1 and all(end == whole for pair in ends for end in pair)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_distil_the_student_of_one(place, kind):
    "Each process draws half of a rollout; plain, and with weights that FSDP2 splits."
    one, two = place / "minillm-one", place / f"{kind}-two"
    assert differences(one, place / "student") > 1e-3  # it has learnt
    assert differences(one, two) < 2e-5
    a, b = (read_json(folder / "report.json") for folder in (one, two))
    assert (
        a["settings"] == b["settings"] and a["steps"] == b["steps"] and a["tokens"] == b["tokens"]
    )
    for name, value in a["results"]["student"].items():
        assert b["results"]["student"][name] == pytest.approx(value, rel=1e-4)
    logs = [[row for row in read_jsonl(f / "metrics.jsonl") if "loss" in row] for f in (one, two)]
    losses = [[row["loss"] for row in log] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    said = (place / "said.txt").read_text()
    assert said.count(f"{kind}-two: 36 rows to train on") == 1  # one process speaks
    assert said.count("minillm_fsdp-two: finished already") == 1


@pytest.mark.parametrize("kind", ["stepwise", "stepwise_fsdp"])
def test_two_processes_search_the_step_by_step_student_of_one(place, kind):
    one, two = place / "stepwise-one", place / f"{kind}-two"
    assert differences(one, two) < 2e-5
    a, b = (read_json(folder / "report.json") for folder in (one, two))
    for arm, found in a["arms"].items():
        same = ("learning_rate", "test", "best_step", "tokens", "outcomes")
        assert all(b["arms"][arm][name] == found[name] for name in same)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


COMMAND = "distill --teacher {0}/teacher --student {0}/student --data {0}/rows.jsonl --out {1}"


def words(place: Path, out: Path, **settings) -> list[str]:
    sets = QUICK | settings
    pairs = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    return ["-m", "kd_notes.cli", *COMMAND.format(place, out).split(), *pairs]


def children(parent: int) -> dict[str, int]:
    "Return {rank: process id} of a launcher's processes."
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                for item in (folder / "environ").read_bytes().split(b"\0"):
                    if item.startswith(b"RANK="):
                        found[item[5:].decode()] = int(folder.name)
        except OSError:
            continue
    return found


def running(process: int) -> bool:
    "Return False for a process that has ended, also one whose parent has not asked for it yet."
    return (Path("/proc") / str(process) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_killed_process_is_started_again_and_the_student_is_the_same(place):
    "accelerate launch --max_restarts 1; process 1 is killed with signal 9 after the first checkpoint."
    settings = {"max_steps": 40, "gradient_accumulation_steps": 1}
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--max_restarts", "1"]
    launcher = subprocess.Popen(
        [*accelerate, "--config_file", str(CONFIG), *words(place, place / "killed", **settings)],
        env=os.environ | LAUNCHED,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 200
    while not list((place / "killed").glob("work/train/checkpoints/step-*")):
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    ranks = children(launcher.pid)
    os.kill(launcher.pid, signal.SIGSTOP)  # it would end process 0 before that can speak
    try:
        os.kill(ranks["1"], signal.SIGKILL)
        while running(ranks["0"]):
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.kill(launcher.pid, signal.SIGCONT)
    out, err = launcher.communicate(timeout=250)
    assert launcher.returncode == 0, err[-3000:]
    assert err.count("process 0 of 2: another process of this launch has ended") == 1
    assert "Traceback" not in err and out.count("killed: goes on from step-") == 1
    models = (str(place / "teacher"), str(place / "student"))
    options = QUICK | settings
    whole = distill(place / "rows.jsonl", *models, "forward_kl", place / "whole", **options)
    assert differences(place / "whole", place / "student") > 1e-3
    assert differences(place / "killed", place / "whole") < 1e-4
    steps = [row["step"] for row in read_jsonl(place / "killed" / "metrics.jsonl") if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == whole["steps"] == 40


def test_a_mistake_is_said_once(place):
    command = words(place, place / "wrong", batch_size=3, gradient_accumulation_steps=1)
    done = subprocess.run(
        [*torchrun(), *command], env=os.environ | LAUNCHED, capture_output=True, text=True
    )
    assert done.returncode != 0 and not (place / "wrong").exists()
    assert done.stderr.count("kd-notes: batch_size * gradient_accumulation_steps: 2 processes") == 1


@pytest.mark.parametrize(
    "number, asked, given",
    [
        (1, (8, 2), (8, 2)),
        (2, (8, 2), (8, 1)),
        (4, (8, 1), (2, 1)),
        (8, (8, 4), (4, 1)),
        (3, (4, 3), (4, 1)),
    ],
)
def test_processes_share_a_step_whatever_their_number(monkeypatch, number, asked, given):
    monkeypatch.setenv("WORLD_SIZE", str(number))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert processes() == 1 and main_process()  # WORLD_SIZE alone may be a cluster's
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    shared = shared_batch(*asked)
    assert tuple(shared.values()) == given and not main_process() or number == 1
    assert (
        shared["batch_size"] * shared["gradient_accumulation_steps"] * number == asked[0] * asked[1]
    )
    lost = lost_process(RuntimeError("pair.cc Connection closed by peer [::1]:3"))
    assert (lost is None) == (number == 1) and lost_process(RuntimeError("other")) is None


def test_adapters_and_split_weights_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="adapters and split weights"):
        distill([], "a", "b", out=tmp_path / "x", fsdp=True, lora={"r": 2})
    assert torch.distributed.is_available() and not (tmp_path / "x").exists()
