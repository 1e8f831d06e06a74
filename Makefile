# Every target sets up what it needs from a bare python3, in .venv, once for each version.
PYTHON ?= python3
BIN := .venv/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
READY := .venv/ready-$(VERSION)

.PHONY: help demo test test-all test-peers test-models test-huggingface check fix bench docs site test-docs wheel clean

help:  ## Lists the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14)' 2>/dev/null || \
	  { echo "nanochat_jax needs Python 3.11 to 3.13, got $(VERSION). Name one: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,plot,dev,docs]'
	@touch $@

demo: $(READY)  ## Trains a small GPT with 8-bit, low-rank Muon, shows what it did, and lets it write
	$(BIN)/nanochat-jax train --config-file configs/tiny_cpu_8bit_galore.toml --checkpoint-dir runs/demo --resume auto
	$(BIN)/nanochat-jax plot runs/demo --output runs/demo/loss.png
	$(BIN)/nanochat-jax generate --checkpoint runs/demo --prompt "def " --max-tokens 200
	@printf '%s\n' '' 'Next, with $(BIN) before each:' \
	  '  nanochat-jax train --resume runs/demo --total-steps 500' \
	  '  nanochat-jax compare --config-file configs/tiny_cpu.toml --output runs/compare' \
	  '  nanochat-jax plan --config-file configs/nano_125m_8bit_galore.toml'

# Tests of a file share what they compile, so they run in one process.
test: $(READY)  ## Runs the tests
	$(BIN)/pytest -n 2 --dist loadfile -m 'not slow'

test-all: $(READY)  ## Runs the slow tests too, on programs compiled as users have them
	XLA_FLAGS= $(BIN)/pytest -n 2 --dist loadfile

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

# Keeps the theme's announcement of its successor from every build.
export NO_MKDOCS_2_WARNING := 1

docs: $(READY)  ## Serves the documentation site on this machine
	$(BIN)/mkdocs serve

site: $(READY)  ## Builds the documentation site into site/, where a warning is an error
	$(BIN)/mkdocs build --strict

test-docs: site  ## Opens the built site in a headless Chromium
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	$(BIN)/pytest -c tests/site/pytest.ini tests/site

wheel: $(READY)  ## Builds wheel and source archive into dist/, and tries both where nothing else is
	$(BIN)/python tests/wheel/run.py

clean:  ## Deletes the virtual environments
	rm -rf .venv .venv-models site dist
