# make train    set up, prepare the default corpus, pretrain CONFIG with torchrun on all local devices
# make test     set up, run every fast test            make lint    ruff and pyright
#   make train CONFIG=configs/small.toml NPROC=8 ARGS="--train.steps 50 --balance.method none"
PYTHON ?= python3
CONFIG ?= configs/tiny.toml
NPROC ?=
ARGS ?=
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup prepare train test test-slow lint clean
help:
	@sed -n 's/^# //p' Makefile

.venv/ready: pyproject.toml constraints.txt
	@[ "$$(uname -s)" = Linux ] || { echo "error: alf-moe runs on Linux only: use a Linux machine or container"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11: pass PYTHON=python3.11 or newer"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make a virtual environment: install its venv module (on Debian python3-venv)"; exit 2; }
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

setup: .venv/ready

prepare: setup
	@$(BIN)/alf-moe prepare

train: prepare
	@$(BIN)/alf-moe train --config $(CONFIG) $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

test: setup
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -q -m "slow and not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
