# `make demo` and `make test` do all of their own set-up; with a complete .venv they need no network.
#
#   PYTHON=python3.12     the interpreter that .venv is made with
#   VENV_FLAGS=...        options of `python -m venv`, such as --system-site-packages
#   HYPOTHESIS_PROFILE    dev, ci or soak; see docs/contributing.md

PYTHON ?= python3
VENV_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CONSTRAINTS := .ci/constraints.txt
TYPES := build/types/dragon
SOURCES := dragon_vm kernels tests benchmarks examples docs

# Two test processes with one thread each: torch would start a thread a core in both of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help demo test lint format types bench memory soak gpu docs docs-serve clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# One thread: the network is small, and threads that wait for each other on a busy machine take minutes.
demo: $(VENV)/.dev ## train on handwritten digits with torch's Adam and ours; writes build/demo/
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m examples.digits

test: lint types ## everything a change must pass; the same examples on each run
	@HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(PYTEST)

lint: $(VENV)/.dev ## style and formatting
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.dev ## format the sources and fix what can be fixed
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

types: $(VENV)/.dev $(TYPES) ## mypy --strict
	@$(BIN)/mypy

# mypy does not follow the import hook of an editable install: it gets the import packages as a tree of links.
$(TYPES): Makefile
	@mkdir -p $@
	@ln -sfn ../../../dragon_vm $@/vm
	@ln -sfn ../../../kernels $@/kernels
	@touch $@

soak: $(VENV)/.dev ## the property tests with 5,000 fresh examples each
	@HYPOTHESIS_PROFILE=soak $(PYTEST) -m hypothesis

bench: $(VENV)/.bench ## the quick set of benchmarks, in under three minutes
	@$(BIN)/python -m benchmarks --turns 0.8 --budget 110
	@$(BIN)/python -m benchmarks host

memory: $(VENV)/.bench ## the quality of the memory modes, and docs/memory.md, in about five minutes
	@$(BIN)/python -m benchmarks.memory

# A GPU machine's own torch and triton match its driver and may be all it has: nothing is downloaded.
gpu: ## the tests that need a GPU, with this machine's own packages and no network
	@test -d $(VENV)-gpu || $(PYTHON) -m venv --system-site-packages $(VENV)-gpu
	@$(VENV)-gpu/bin/python -m pip --quiet install --no-build-isolation --no-deps --no-index --editable .
	@$(VENV)-gpu/bin/python -m pytest -m gpu

docs: $(VENV)/.dev $(TYPES) ## the documentation's site, under build/site/
	@$(BIN)/python -m zensical build --clean --strict

docs-serve: $(VENV)/.dev $(TYPES) ## the same, shown on localhost:8000 and built again after each change
	@$(BIN)/python -m zensical serve

clean: ## remove what the other targets made, .venv included
	rm -rf $(VENV) $(VENV)-gpu build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's Python comes without ensurepip: there the outer pip installs the first one inside.
$(BIN)/python:
	@echo "Making $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, not " + sys.version if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV_FLAGS) $(VENV) \
		&& $(PYTHON) -m pip --python $(VENV) install pip; }

# torch first and by itself, so that what depends on it takes this build and no other. Nothing is built in
# isolation: pip would fetch setuptools for that even when .venv is complete.
$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing into $(VENV) (minutes on the first run) ..."
	@$(PIP) install --constraint $(CONSTRAINTS) torch setuptools
	@$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	@$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[bench]'
	@touch $@
