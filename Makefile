# make demo   asks a chat model with a compressed KV cache, and trains small models that think
# make test   lint, types and the whole test suite
# make docs   writes the cards, the pages of methods, the figures and the tables from docstrings and results/
# All set themselves up in .venv with the pinned versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint docs clean

demo: $(VENV)/.runtime
	$(BIN)/pondera demo --out demo

test: lint
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -rs

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || (echo "run: $(BIN)/ruff format ." && false)
	$(BIN)/pyright

docs: $(VENV)/.runtime
	$(BIN)/python -m tools.cards
	$(BIN)/python -m tools.docs.build

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pondera needs Python 3.11 or newer; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf]'
	touch $@

$(VENV)/.development: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache
