# Every target sets itself up through scripts/bootstrap.sh; no environment has to be active.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.NOTPARALLEL:
export RLSYNC_DEV := 1
# Tests start hundreds of processes, each of which would compile all sources of its own that it imports.
unexport PYTHONDONTWRITEBYTECODE

SETUP := source scripts/bootstrap.sh
# Folders that hold typed code.
TYPED := $(wildcard rlsync workers benchmarks examples)
# Files of tests that run side by side: engines start on one core each. On GPUs one after the other, because each takes its share of a GPU.
LANES ?= $(if $(shell command -v nvidia-smi),0,2)
IN_LANES := --numprocesses=$(LANES) --no-loadscope-reorder

.PHONY: docs help setup test test-unit test-busy test-all chaos lint static format

help:
	@echo "make setup      make or complete .venv"
	@echo "make test       ruff and mypy, then all tests; those that need GPUs say so and skip where there are none"
	@echo "make test-unit  the tests that need no process group, vLLM or Ray: a minute"
	@echo "make test-busy  the same beside two busy loops on every core: what then fails, fails on a busy machine"
	@echo "make chaos      FAULTS=100 SEED=0: random faults in syncs of real engines, half an hour, and the tally"
	@echo "make lint       ruff, mypy and the layering test"
	@echo "make docs       the documentation as a site, in site/"
	@echo "make format     rewrite the sources as ruff formats them"

setup:
	@$(SETUP); echo "ready: $$PYTHON"

test: static test-all

test-unit:
	@$(SETUP); "$$PYTHON" -m pytest $(IN_LANES) tests/unit

BUSY ?= tests/unit
test-busy:
	@$(SETUP); for _ in $$(seq $$((2 * $$(nproc)))); do "$$PYTHON" -c 'while True: pass' & done; trap 'kill $$(jobs -p)' EXIT; \
	"$$PYTHON" -m pytest $(IN_LANES) $(BUSY)

# pytest fails by itself when it collects nothing. Unit tests come last: many small files fill up both lanes.
test-all:
	@$(SETUP); "$$PYTHON" -m pytest $(IN_LANES) --durations=10 tests

FAULTS ?= 100
SEED ?= 0
chaos:
	@$(SETUP); "$$PYTHON" -m tests.chaos.campaign --faults $(FAULTS) --seed $(SEED)

# What is said of the sources without running any.
static:
	@$(SETUP); "$$PYTHON" -m ruff check .
	@$(SETUP); "$$PYTHON" -m ruff format --check .
	@$(SETUP); MYPY_NUM_WORKERS=2 "$$PYTHON" -m mypy $(TYPED)

lint: static
	@$(SETUP); "$$PYTHON" -m pytest -q tests/unit/test_layering.py

format:
	@$(SETUP); "$$PYTHON" -m ruff format .; "$$PYTHON" -m ruff check --fix .

# In an environment of its own, because nothing else needs these packages and these need nothing of the others.
docs: .venv-docs/.made
	@.venv-docs/bin/python scripts/draw.py
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet
	@echo "made: site/index.html"

.venv-docs/.made: requirements/docs.lock
	@rm -rf .venv-docs
	@"$${PYTHON:-python3}" -m venv .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements/docs.lock
	@touch $@
