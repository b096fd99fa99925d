# mmgen: every command sets up what it needs in .venv on a fresh machine (Python >= 3.11).
#
#   make demo       scenes in, one network that draws and answers, a report to look at (about ten minutes on 2 cores)
#   make test       the fast tests (ten minutes at most)
#   make test-slow  the slow ones
#   make check      lint and types
#   make smoke      the whole chain at tiny size in under a minute
#   make ladder     run the tests that earn the rungs of `mmgen recipes`, and write them down
#   make golden     write the losses of tests/golden anew, after a change that should move them
#   make docs       the generated parts of README.md

PYTHON ?= python3
VENV   := .venv
BIN    := $(abspath $(VENV))/bin

.PHONY: demo test test-slow check format smoke ladder golden docs setup setup-dev clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmgen needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,data]'
	@touch $@

demo: setup
	@$(MAKE) --no-print-directory -C examples/01-scenes MMGEN=$(BIN)/mmgen

smoke: setup
	@rm -rf runs/smoke
	@$(MAKE) --no-print-directory -C examples/01-scenes MMGEN=$(BIN)/mmgen WORK=$(abspath runs/smoke) SIZE=tiny COUNT=96 PROMPTS=8 STEPS=25

test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ladder: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m stages.ladder

golden: setup-dev
	MMGEN_GOLDEN=write OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_golden.py

docs: setup
	$(BIN)/python -m stages.ladder --readme README.md

clean:
	rm -rf runs examples/*/work .pytest_cache .mypy_cache .ruff_cache
