# Every target sets up what it needs from a bare python3, in .venv, once for each version.
PYTHON ?= python3
BIN := .venv/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
READY := .venv/ready-$(VERSION)

.PHONY: help demo test test-all test-peers test-models test-huggingface check fix bench clean

help:  ## Lists the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14)' 2>/dev/null || \
	  { echo "nanochat_jax needs Python 3.11 to 3.13, got $(VERSION). Name one: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,plot,dev]'
	@touch $@

demo: $(READY)  ## Trains a small GPT on the standard library with 8-bit, low-rank Muon
	$(BIN)/nanochat-jax train --config-file configs/tiny_cpu_8bit_galore.toml

# Tests of a file share what they compile, so they run in one process.
test: $(READY)  ## Runs the tests
	$(BIN)/pytest -n 2 --dist loadfile -m 'not slow'

test-all: $(READY)  ## Runs the slow tests too
	$(BIN)/pytest -n 2 --dist loadfile

test-peers: $(READY)  ## Installs bitsandbytes and galore-torch, and compares with them
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	$(BIN)/pytest -m peers

test-models: $(READY)  ## Installs real JAX packages, and checks the trees of their models
	$(BIN)/python tests/models/run.py

test-huggingface: $(READY)  ## Installs transformers, and compares models with it
	$(BIN)/python tests/huggingface/run.py

check: $(READY)  ## Checks formatting, lints and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright -p pyproject.toml

fix: $(READY)  ## Formats, and mends what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## Measures an optimizer step beside optax.contrib.muon
	$(BIN)/python benchmarks/optimizer_step.py

clean:  ## Deletes the virtual environments
	rm -rf .venv .venv-models
