"""The built wheel in an empty environment: nothing of the checkout, no extra, only the core requirements."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def call(*command: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    "Run a command far from the checkout, without its Python path and caches."
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTHON", "VIRTUAL_ENV", "KD_NOTES", "COV"))
    }
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=env | {"KD_NOTES_CACHE": str(cwd / "cache")},
    )
    assert not check or done.returncode == 0, (
        f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "A wheel built from a copy of what a clone would hold."
    copy = tmp_path_factory.mktemp("source") / "checkout"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for name in (n for n in names.stdout.split("\0") if n and (ROOT / n).is_file()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    assert (copy / "setup.py").is_file(), "git ls-files gave nothing: run the tests in a clone"
    call(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--use-pep517",
        "-w",
        copy.parent,
        copy,
        cwd=copy.parent,
    )
    return next(copy.parent.glob("kd_notes-*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    "The interpreter of a new environment that holds the wheel and its core requirements."
    home = tmp_path_factory.mktemp("empty")
    call(sys.executable, "-m", "venv", home / "venv", cwd=home)
    python = home / "venv" / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", wheel, "-c", ROOT / "constraints.txt", cwd=home)
    return python


def ask(python: Path, code: str, tmp_path: Path) -> str:
    return call(python, "-c", code, cwd=tmp_path).stdout.strip()


def test_wheel_holds_code_notebooks_and_data_and_is_small(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
    inside, checkout = {n for n in names if n.startswith("kd_notes/")}, wheel.parent / "checkout"
    for folder, there in (
        ("kd_notes", "kd_notes"),
        ("nbs", "kd_notes/_nbs"),
        ("data", "kd_notes/_data"),
    ):
        files = [
            p
            for p in (checkout / folder).rglob("*")
            if p.is_file() and p.suffix in (".py", ".ipynb", ".jsonl", ".json", ".csv")
        ]
        wanted = {
            f"{there}/{p.relative_to(checkout / folder).as_posix()}"
            for p in files
            if not any(
                part.startswith((".", "_")) and part not in ("__init__.py", "_modidx.py")
                for part in p.relative_to(checkout / folder).parts
            )
        }
        heavy = {
            n
            for n in wanted
            if {"adapter", "adapters", "backbone", "backbones"} & set(n.split("/"))
        }
        assert wanted - heavy <= inside, sorted(wanted - heavy - inside)[:5]
        assert not heavy & inside, sorted(heavy & inside)[:5]
    for folder in ("tasks", "facts", "tokenizer", "reported", "teacher"):
        carried = [n for n in inside if n.startswith(f"kd_notes/_data/{folder}/")]
        assert carried or not (checkout / "data" / folder).exists(), (
            f"the wheel carries nothing of data/{folder}"
        )
    assert not [n for n in inside if n.endswith(".safetensors")]
    assert not [
        n
        for n in names
        if ".ipynb_checkpoints" in n
        or "__pycache__" in n
        or n.startswith(("tests/", "build/", "site/"))
    ]
    assert wheel.stat().st_size < 60e6


def test_wheel_works_with_nothing_but_its_core_requirements(python, tmp_path):
    "Places, an embedded task with its checksum verified, one loss; and no library of an extra is present."
    places = "from kd_notes.core import *; print(repo_root(), data_dir().name, nbs_dir().name, (nbs_dir()/'index.ipynb').is_file())"
    assert (
        ask(python, places.replace("import *", "import data_dir, nbs_dir, repo_root"), tmp_path)
        == "None _data _nbs True"
    )
    task = "from kd_notes.data.examples import load_split; e = load_split('nli', 'test'); print(len(e), e[0].task, bool(e[0].input), e[0].label)"
    words = ask(python, task, tmp_path).split()
    assert words[:3] == ["1000", "nli", "True"] and words[3] in (
        "entailment",
        "neutral",
        "contradiction",
    )
    teacher = (
        "from kd_notes.core import data_dir, read_jsonl; files = sorted((data_dir()/'teacher').glob('*/*.jsonl')); "
        "print(all('id' in read_jsonl(f)[0] for f in files))"
    )
    assert ask(python, teacher, tmp_path) == "True"
    absent = "import importlib.util as u; print([m for m in ('transformers', 'pandas', 'matplotlib', 'papermill', 'nbdev', 'datasets') if u.find_spec(m)])"
    assert ask(python, absent, tmp_path) == "[]"


LOSS_BEFORE_DIVERGENCES = """
import math, types, torch
from kd_notes.training.batches import causal_batch, target_nll
class Uniform:
    config = types.SimpleNamespace(is_encoder_decoder=False, logit_scale=2)  # called as a whole
    def __call__(self, input_ids, **_): return types.SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))
nll = target_nll(Uniform(), causal_batch([([1, 2], [3, 4]), ([1], [5])], pad_id=0))
print(abs(float(nll.float().mean()) - math.log(7)) < 1e-6, nll.numel())
"""
LOSS = """
import math, torch
from kd_notes.losses.divergences import reverse_kl
print(abs(float(reverse_kl(torch.zeros(2, 3, 7), torch.zeros(2, 3, 7)))) < 1e-6, 3)
"""


def test_wheel_computes_a_loss(python, tmp_path):
    "Cross-entropy of a uniform model is log V; and, once the module exists, the KL of equal distributions is 0."
    assert ask(python, LOSS_BEFORE_DIVERGENCES, tmp_path) == "True 3"
    if (ROOT / "kd_notes" / "divergences.py").exists():
        assert ask(python, LOSS, tmp_path) == "True 3"


def test_wheel_lists_the_experiments(wheel, python, tmp_path):
    listed = call(python.parent / "kd-notes", "list", cwd=tmp_path).stdout
    for notebook in (wheel.parent / "checkout" / "nbs" / "results").glob("*.ipynb"):
        assert notebook.stem in listed


def test_a_missing_extra_is_said_in_words(python, tmp_path):
    "What needs more than the core ends with the name of the extra, not with a traceback."
    done = call(
        python.parent / "kd-notes",
        "reproduce",
        "--all",
        "--profile",
        "smoke",
        cwd=tmp_path,
        check=False,
    )
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr + done.stdout
        and "notebooks" in done.stderr + done.stdout
    )
