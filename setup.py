"""Reads everything from settings.ini, as nbdev does, so that name, version, requirements and extras are written down once."""

import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
HEAVY = {
    "adapter",
    "adapters",
    "backbone",
    "backbones",
}  # folders of weights below data/: in the repository, not in the wheel

config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
STATUS = {
    "1": "1 - Planning",
    "2": "2 - Pre-Alpha",
    "3": "3 - Alpha",
    "4": "4 - Beta",
    "5": "5 - Production/Stable",
}


def files_below(folder: str) -> list[str]:
    "Files below a top-level folder, relative to it, without caches and hidden files."
    paths = (
        p.relative_to(ROOT / folder) for p in sorted((ROOT / folder).rglob("*")) if p.is_file()
    )
    # Lessons keep models in a folder cache beside them when they run.
    return [
        p.as_posix()
        for p in paths
        if not any(part.startswith((".", "_")) or part == "cache" for part in p.parts)
    ]


def data_files() -> list[str]:
    "The files of data/ that the wheel carries."
    return [
        n
        for n in files_below("data")
        if not HEAVY & set(n.split("/")) and not n.endswith(".safetensors")
    ]


lib = cfg["lib_name"]
packages, package_dir, package_data = find_packages(ROOT, include=[lib, f"{lib}.*"]), {}, {}
if not {"editable_wheel", "develop"} & set(sys.argv):
    # A wheel has no checkout around it: the notebooks and the data travel inside the package. An editable install needs neither.
    for name, folder, names in (
        ("_nbs", "nbs", files_below("nbs")),
        ("_data", "data", data_files()),
    ):
        if names:
            packages.append(f"{lib}.{name}")
            package_dir[f"{lib}.{name}"] = folder
            package_data[f"{lib}.{name}"] = names

extras = {
    key.removesuffix("_requirements"): value.split()
    for key, value in cfg.items()
    if key.endswith("_requirements")
}
extras["all"] = sorted({requirement for values in extras.values() for requirement in values})
readme = ROOT / "README.md"

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {STATUS[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        *(
            f"Programming Language :: Python :: {version}"
            for version in cfg["python_versions"].split()
        ),
    ],
    python_requires=f">={cfg['min_python']}",
    packages=packages,
    package_dir=package_dir,
    package_data=package_data,
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
