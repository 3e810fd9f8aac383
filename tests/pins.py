"""The pins of constraints.txt, compared with what every pinned package requires: `make pins`.

An installation shows only what one machine needs: a CPU build of torch names no triton, and nobody
sees there that another machine refuses the pin. So `make pins` asks the package index for each pin
and records what it says in tests/fixtures/pins.json; test_pins.py compares, without a network, for
every platform and every Python below.
"""

import configparser
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "fixtures" / "pins.json"
AGAIN = "Run: make pins, and commit tests/fixtures/pins.json."

# The oldest releases that newcomers meet: 3.11.2 is Debian 12's.
PYTHONS = ("3.11.2", "3.12.1", "3.13.0", "3.14.0")
PLATFORMS = {
    "Linux x86_64": ("posix", "linux", "Linux", "x86_64"),
    "Linux aarch64": ("posix", "linux", "Linux", "aarch64"),
    "macOS arm64": ("posix", "darwin", "Darwin", "arm64"),
    "Windows": ("nt", "win32", "Windows", "AMD64"),
}
# torch's CUDA build names the exact versions of CUDA itself.
NOT_PINNED = re.compile(r"nvidia-|cuda-")


def canonical(text: str) -> str:
    "The name of a package as every tool compares it."
    return re.sub(r"[-_.]+", "-", text).lower()


def read_pins() -> dict[str, str]:
    "Version of each package in constraints.txt."
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, _, version in pins}


def read_requirements() -> list[Requirement]:
    "What settings.ini requires, with all extras."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    values = [
        value
        for key, value in config["DEFAULT"].items()
        if key == "requirements" or key.endswith("_requirements")
    ]
    return [Requirement(text) for value in values for text in value.split()]


def read_record() -> dict:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def environments() -> Iterator[tuple[str, dict[str, str]]]:
    "A name and the values of markers for each supported platform and Python."
    for platform, (os_name, sys_platform, system, machine) in PLATFORMS.items():
        for python in PYTHONS:
            yield (
                f"{platform}, Python {python}",
                {
                    "os_name": os_name,
                    "sys_platform": sys_platform,
                    "platform_system": system,
                    "platform_machine": machine,
                    "platform_release": "",
                    "platform_version": "",
                    "platform_python_implementation": "CPython",
                    "implementation_name": "cpython",
                    "implementation_version": python,
                    "python_full_version": python,
                    "python_version": python.rpartition(".")[0],
                },
            )


def in_force(marker: Marker | None, environment: dict[str, str], extras: frozenset[str]) -> bool:
    "Whether a requirement counts here, for a package that was asked for with these extras."
    if marker is None:
        return True
    return any(marker.evaluate({**environment, "extra": extra}) for extra in {"", *extras})


def walk(
    roots: list[Requirement], packages: dict, environment: dict[str, str]
) -> Iterator[tuple[str, Requirement]]:
    "Every requirement in force in one environment, with the package that has it, from the roots."
    todo = [("settings.ini", root, frozenset()) for root in roots]
    seen = set()
    while todo:
        asker, requirement, extras = todo.pop()
        if not in_force(requirement.marker, environment, extras):
            continue
        yield asker, requirement
        name = canonical(requirement.name)
        package = packages.get(name)
        step = name, frozenset(requirement.extras)
        if package is None or step in seen:
            continue
        seen.add(step)
        asker = f"{name}=={package['version']}"
        todo += [(asker, Requirement(text), step[1]) for text in package["requires"]]


def problems(roots: list[Requirement], packages: dict) -> list[str]:
    "What is wrong with recorded packages, a sentence each; empty if they fit each other."
    found: dict[str, list[str]] = {}
    for where, environment in environments():
        for asker, requirement in walk(roots, packages, environment):
            name = canonical(requirement.name)
            package = packages.get(name)
            if package is None:
                pinned_there = environment["sys_platform"] == "linux"
                if pinned_there and not NOT_PINNED.match(name):
                    found.setdefault(f"{asker} requires {name}, which has no pin", []).append(where)
                continue
            pin = f"{name}=={package['version']}"
            if unknown := requirement.extras - set(package["extras"]):
                problem = f"{asker} requires {name}[{','.join(sorted(unknown))}], not recorded"
                found.setdefault(problem, []).append(where)
            if not requirement.specifier.contains(package["version"], prereleases=True):
                problem = f"{pin} is pinned, but {asker} requires {name}{requirement.specifier}"
                found.setdefault(problem, []).append(where)
            if environment["python_full_version"] not in SpecifierSet(package["python"]):
                problem = f"{pin} wants Python {package['python']}"
                found.setdefault(problem, []).append(where)
    withdrawn = [
        f"{name}=={package['version']} was withdrawn from the index (yanked)"
        for name, package in packages.items()
        if package["yanked"]
    ]
    return withdrawn + [
        f"{problem} ({'; '.join(dict.fromkeys(wheres))})" for problem, wheres in found.items()
    ]


def never_asked_for(roots: list[Requirement], packages: dict) -> list[str]:
    "Recorded packages that nothing requires, on any platform."
    asked = {
        canonical(requirement.name)
        for _, environment in environments()
        for _, requirement in walk(roots, packages, environment)
    }
    return sorted(set(packages) - asked)


def ask_index(pins: dict[str, str]) -> dict:
    """What the package index says of each pin. Downloads metadata, hardly any package.

    pip reports it in a dry run. A new pip in an environment of its own does it: older ones do not
    report what was withdrawn. It asks for the newest Python, so that a build of torch that lies on
    this machine for another one is not mistaken for the ordinary one.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "venv"
        venv.create(home, with_pip=True)
        python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
        pip = [python, "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip"], check=True)
        report = Path(folder) / "report.json"
        options = [
            "--dry-run",
            "--quiet",
            "--no-deps",
            "--ignore-installed",
            "--report",
            report,
            "--python-version",
            PYTHONS[-1],
            "--target",
            Path(folder) / "target",
        ]
        wanted = [f"{name}=={version}" for name, version in pins.items()]
        subprocess.run([*pip, "install", *options, *wanted], check=True)
        return json.loads(report.read_text(encoding="utf-8"))


def to_packages(report: dict, pins: dict[str, str]) -> dict:
    "The part of pip's report that is recorded, by package."
    packages = {}
    for item in report["install"]:
        metadata = item["metadata"]
        name = canonical(metadata["name"])
        if metadata["version"] != pins[name]:
            sys.exit(
                f"pins: {name} came as {metadata['version']}, not as the {pins[name]} of the "
                "index: another build lies on this machine, and pip is told to take it."
            )
        packages[name] = {
            "version": metadata["version"],
            "python": metadata.get("requires_python", ""),
            "yanked": item["is_yanked"],
            "extras": metadata.get("provides_extra", []),
            "requires": metadata.get("requires_dist", []),
        }
    return packages


def only_asked_for(roots: list[Requirement], packages: dict) -> dict:
    "Without the extras that nobody asks for, and what they require: most of the text."
    asked: dict[str, set[str]] = {}
    for _, environment in environments():
        for _, requirement in walk(roots, packages, environment):
            asked.setdefault(canonical(requirement.name), set()).update(requirement.extras)
    extra = re.compile(r"extra *== *['\"]([^'\"]+)['\"]")
    kept = {}
    for name, package in sorted(packages.items()):
        extras = asked.get(name, set())
        comparable = set(map(canonical, extras))
        requires = {
            text
            for text in package["requires"]
            if not extra.search(text) or comparable & set(map(canonical, extra.findall(text)))
        }
        kept[name] = package | {"extras": sorted(extras), "requires": sorted(requires)}
    return kept


def main() -> None:
    pins = read_pins()
    roots = read_requirements()
    print(f"pins: asking the package index about {len(pins)} packages (about a minute)", flush=True)
    packages = only_asked_for(roots, to_packages(ask_index(pins), pins))
    record = {"checked": date.today().isoformat(), "packages": packages}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if found := problems(roots, packages):
        sys.exit("pins: change constraints.txt:\n" + "\n".join(found))
    print(f"pins: {RECORD.relative_to(ROOT)} written; the pins fit each other on every platform")


if __name__ == "__main__":
    main()
