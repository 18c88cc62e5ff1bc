# What people and CI call; `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= build/demo

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CORE := $(VENV)/core.stamp
DEV := $(VENV)/dev.stamp
REQUIREMENTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two targets asked for at once share one environment: never install in parallel.
.NOTPARALLEL:
.PHONY: help demo test test-gpu lint bench clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(CORE) ## search the best policy for a T4: policy JSON and a figure in build/demo
	@mkdir -p $(DEMO_DIR)
	$(BIN)/python -m costmodel.search --gpu t4 --save-policy $(DEMO_DIR)/policy.json --plot $(DEMO_DIR)/search.png

test: lint ## check style, types and imports, then run the tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

test-gpu: $(DEV) ## on a machine with a CUDA device: the tests that need one
	$(BIN)/python -m pytest -m gpu -ra tests

lint: $(DEV) ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(CORE) ## time the planner
	$(BIN)/python -m benchmarks.planning

clean: ## remove outputs and caches
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove the virtual environment as well
	rm -rf $(VENV)

# The demo needs the core only, so that a first result comes quickly; the tests add torch and the tools.
$(CORE): $(REQUIREMENTS) | $(BIN)/pip
	$(INSTALL) --editable .
	@touch $@

$(DEV): $(REQUIREMENTS) | $(BIN)/pip
	$(INSTALL) --editable '.[dev]'
	@touch $(CORE) $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; found = sys.version.split()[0]; sys.version_info < (3, 11) and sys.exit("tierwise needs Python 3.11 or newer, but $(PYTHON) is Python " + found + ". Name another one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
