# make help shows the targets. Python packages go into .venv; nothing is installed outside this folder.
SHELL := /bin/bash
PYTHON ?= python3
CONFIG ?= configs/tiny.toml
NPROC ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The default corpus is prepared when the run reads it: no other data.path in CONFIG, none in ARGS.
corpus := data/enwik8-8192
own_data := $(findstring --data.path,$(ARGS))$(shell sed -n '/^\[data\]/,/^\[[^d]/p' $(CONFIG) 2>/dev/null | grep '^path' | grep -v '"$(corpus)"')

.DEFAULT_GOAL := help
.PHONY: help setup prepare train test test-slow lint clean

help:  ## This list
	@echo 'make train CONFIG=configs/tiny.toml NPROC=2 ARGS="--train.steps 50 --balance.method none"'
	@sed -n 's/^\([a-z-]*\):.*## /  \1|/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: $(STAMP)  ## Create .venv and install; again only when pyproject.toml or constraints.txt change

$(STAMP): pyproject.toml constraints.txt
	@case "$$(uname -s)" in Linux) ;; \
	  *) echo "error: alf-moe runs on Linux only, and this is $$(uname -s): use a Linux machine, WSL2 or a container" >&2; exit 2;; esac
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: $(PYTHON) is not installed: name a Python >= 3.11 with make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version) is too old: name a Python >= 3.11 with make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

prepare: setup  ## Fetch the default corpus, train its tokenizer, write the token files (once)
	$(BIN)/alf-moe prepare

train: setup $(if $(strip $(own_data)),,prepare)  ## Train CONFIG (one or more files) on NPROC processes with the overrides ARGS
	$(BIN)/alf-moe train $(addprefix --config ,$(CONFIG)) $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

test: setup  ## The tests that need neither minutes nor a GPU
	$(BIN)/python -m pytest -q -p no:cacheprovider

test-slow: setup  ## The long tests
	$(BIN)/python -m pytest -q -p no:cacheprovider -m 'slow and not gpu'

lint: setup  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:  ## Remove .venv and caches; data/ and runs/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
