# What a newcomer runs. Each target works from a clean clone with Python >= 3.11 and make.
#   make venv                  environment for this machine's CPU
#   make venv EXTRAS=cuda,eval environment for a GPU node, with the evaluation harness
#   make test                  everything that needs no real model
#   make test-real             downloads a small real model and compares with transformers
#   make test-real-trio        the two Qwen2.5-Coder models against a plain torch loop (an hour)
#   make test-reference        the published code's stored completions against its stored results
#   make lint                  ruff (rules and format) and mypy

PYTHON ?= python3
EXTRAS ?= cpu
BIN := .venv/bin

.PHONY: venv test test-real test-real-trio test-reference lint format

venv: .venv/installed

.venv/installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS),test]'
	@touch $@

test: venv
	$(BIN)/python -m pytest -n 2

test-real: venv
	$(BIN)/python -m pytest -m real

test-real-trio: venv
	$(BIN)/python -m pytest -m real_trio

test-reference: venv
	$(BIN)/python -m pytest -m reference

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
