# What a newcomer runs. Each target works from a clean clone with Python >= 3.11 and make.
#   make quickstart            a family of models from scratch, proxy-tuned: ten minutes on a laptop
#   make venv                  environment for this machine's CPU
#   make venv EXTRAS=cuda,eval environment for a GPU node, with the evaluation harness
#   make test                  everything that needs no real model
#   make test-real             downloads a small real model and compares with transformers
#   make test-real-trio        the two Qwen2.5-Coder models against a plain torch loop (an hour)
#   make test-reference        the published code's stored completions against its stored results
#   make device-check          what this machine does, on random weights: eight minutes on a GPU
#   make lint                  ruff (rules and format) and mypy

PYTHON ?= python3
EXTRAS ?= cpu
BIN := .venv/bin

.PHONY: quickstart venv test test-real test-real-trio test-reference device-check lint format

quickstart: venv
	$(BIN)/python quickstart.py

venv: .venv/installed-$(EXTRAS)

.venv/installed-$(EXTRAS): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 needed; set PYTHON=")'
	@echo "Installing what proxy_jax needs into .venv: a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

.venv/testing: .venv/installed-$(EXTRAS)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

test: .venv/testing
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-real: .venv/testing
	$(BIN)/python -m pytest -m real

test-real-trio: .venv/testing
	$(BIN)/python -m pytest -m real_trio

test-reference: .venv/testing
	$(BIN)/python -m pytest -m reference

device-check: venv
	$(BIN)/python -m device_check

lint: .venv/testing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/testing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
