# What is done most often, one command each. The set-up behind them is scripts/setup.sh.

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
# Most tests wait for other processes, so there are more workers than CPUs: two for every CPU, 8 at most.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? 2 * n : 8)))
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
export PYTHON TORCH
# Tests start hundreds of processes, and these share compiled bytecode, even if the variable says otherwise.
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help setup demo test-fast test test-gpu test-matrix lint chaos bench docs clean

help:  ## show this
	@echo "make TARGET [ARGS='options'] [PYTHON=$(PYTHON)] [TORCH=$(TORCH)]"
	@sed -n 's/^\([a-z-]*\):  ## /  \1\t/p' Makefile
	@echo "Each makes or reuses the virtual environment .venv. The torch of PYTHON is used if it has one, else TORCH."

setup:  ## only make or update .venv, with what the tests and linters need
	@bash scripts/setup.sh dev

demo:  ## four processes share memory, on any machine: ARGS='--ranks 2'
	@bash scripts/setup.sh
	.venv/bin/symmem demo --ranks 4 $(ARGS)

test-fast:  ## the tests that start no ranks and compile nothing: less than a minute
	@bash scripts/setup.sh test
	.venv/bin/python -m pytest $(PARALLEL) -m "not ranks and not slow and not gpu" $(ARGS)

test:  ## all tests that need no GPU: ARGS='-k rendezvous'
	@bash scripts/setup.sh test
	.venv/bin/python -m pytest $(PARALLEL) -m "not gpu" $(ARGS)

test-gpu:  ## the tests that need GPUs, one after the other; skipped where there are none
	@bash scripts/setup.sh test
	.venv/bin/python -m pytest --timeout 900 -m gpu $(ARGS)

test-matrix:  ## what depends on torch, on several versions of it: VERSIONS='2.11.0 2.13.0', VENVS, PIP_ARGS
	@bash scripts/setup.sh test
	bash scripts/test-matrix.sh $(ARGS)

lint:  ## ruff and mypy
	@bash scripts/setup.sh dev
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy
	.venv/bin/python -m mypy tests

chaos:  ## random programs on ranks that die, stop and are interrupted: SEED=1 MINUTES=1 ARGS='--episodes 1'
	@bash scripts/setup.sh
	.venv/bin/python scripts/chaos.py --seed $(or $(SEED),1) --minutes $(or $(MINUTES),1) $(ARGS)

bench:  ## symmem bench: ARGS='host --json'
	@bash scripts/setup.sh
	.venv/bin/symmem bench $(or $(ARGS),host)

docs:  ## the API reference, build/docs/index.html; the guides are in docs/
	@bash scripts/setup.sh docs
	.venv/bin/python scripts/api_reference.py build/docs

clean:  ## remove .venv and everything else that is made
	rm -rf .venv/bin/python .venv .venv-matrix build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o -name __pycache__ -prune -exec rm -rf {} +
