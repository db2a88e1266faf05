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
# Files of tests that run side by side: two that compute, as engines start on one core each, and one that mostly waits (tests/conftest.py).
# On GPUs one after the other, because each takes its share of a GPU.
LANES ?= $(if $(shell command -v nvidia-smi),0,3)
IN_LANES := --numprocesses=$(LANES) --no-loadscope-reorder

.PHONY: docs help setup test test-unit test-busy test-all chaos lint ruff static format

help:
	@echo "make setup      make or complete .venv"
	@echo "make test       ruff, then all tests and mypy beside them; those that need GPUs say so and skip where there are none"
	@echo "make test-unit  the tests that need no process group, vLLM or Ray: a minute"
	@echo "make test-busy  the same beside two busy loops on every core: what then fails, fails on a busy machine"
	@echo "make chaos      FAULTS=100 SEED=0: random faults in syncs of real engines, half an hour, and the tally"
	@echo "make lint       ruff, mypy and the layering test"
	@echo "make docs       the documentation as a site, in site/"
	@echo "make format     rewrite the sources as ruff formats them"

setup:
	@$(SETUP); echo "ready: $$PYTHON"

# Types beside the tests, whose lanes take turns in leaving a core idle; what is wrong with them is said behind the tests.
test: ruff
	@$(SETUP); said=$$(mktemp); nice "$$PYTHON" -m mypy $(TYPED) >"$$said" 2>&1 & types=$$!; \
	trap 'kill $$types 2>/dev/null || true; rm -f "$$said"' EXIT; \
	tested=0; $(MAKE) --no-print-directory test-all || tested=$$?; \
	typed=0; wait $$types || typed=$$?; cat "$$said"; exit $$((tested ? tested : typed))

test-unit:
	@$(SETUP); "$$PYTHON" -m pytest $(IN_LANES) tests/unit

BUSY ?= tests/unit
test-busy:
	@$(SETUP); for _ in $$(seq $$((2 * $$(nproc)))); do "$$PYTHON" -c 'while True: pass' & done; trap 'kill $$(jobs -p)' EXIT; \
	"$$PYTHON" -m pytest $(IN_LANES) $(BUSY)

# pytest fails by itself when it collects nothing. Unit tests come last: many small files fill up the lanes.
# In a new clone all that they import is compiled first, once and not in each lane.
test-all:
	@$(SETUP); [ -d tests/unit/__pycache__ ] || "$$PYTHON" -m pytest --collect-only -q tests >/dev/null 2>&1 || true; \
	"$$PYTHON" -m pytest $(IN_LANES) --durations=10 tests

FAULTS ?= 100
SEED ?= 0
chaos:
	@$(SETUP); "$$PYTHON" -m tests.chaos.campaign --faults $(FAULTS) --seed $(SEED)

ruff:
	@$(SETUP); "$$PYTHON" -m ruff check .
	@$(SETUP); "$$PYTHON" -m ruff format --check .

# What is said of the sources without running any.
static: ruff
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
