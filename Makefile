# What people and CI call; `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= build/demo
BENCH_GPU_DIR ?= build/bench-gpu

BIN := $(VENV)/bin
DEMO_MODEL := --model dummy:opt-350m --device cpu --hardware $(DEMO_DIR)/machine.json --offload-dir $(DEMO_DIR)/offload \
	--gpu-memory 400MiB --cpu-memory 100MiB --prompt-len 64 --gen-len 8
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CORE := $(VENV)/core.stamp
RUNTIME := $(VENV)/runtime.stamp
NOTEBOOKS := $(VENV)/notebooks.stamp
DEV := $(VENV)/dev.stamp
REQUIREMENTS := pyproject.toml constraints.txt

comma := ,
step = @printf '\n── %s\n\n' '$(1)'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two targets asked for at once share one environment: never install in parallel.
.NOTPARALLEL:
.PHONY: help demo demo-plan demo-run test test-gpu lint bench bench-gpu notebooks clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: demo-plan demo-run ## plan for a T4; then measure, plan, run and check on this machine: build/demo

# On paper first: planning needs no torch, so that something is to be seen within a minute.
demo-plan: $(CORE)
	@mkdir -p $(DEMO_DIR)
	$(call step,1. On paper: where should OPT-30B live on an NVIDIA T4?)
	$(BIN)/python -m costmodel.search --gpu t4 --save-policy $(DEMO_DIR)/policy.json --plot $(DEMO_DIR)/search.png

# OPT-350M holds 632 MiB of weights and is given 500 MiB for weights, cache and buffers together.
demo-run: $(RUNTIME)
	@mkdir -p $(DEMO_DIR)/offload
	@rm -f $(DEMO_DIR)/validation.json
	$(call step,2. This machine: what can it really do? Its rates are what the predictions below are made of (20 s))
	$(BIN)/python -m profiler --quick --device cpu --model opt-350m --offload-dir $(DEMO_DIR)/offload --out $(DEMO_DIR)/machine.json
	$(call step,3. One run: OPT-350M with random weights (632 MiB) in 400 + 100 MiB of memory; the rest is on disk)
	@printf 'No GPU is used: 400 MiB of memory play its part and are called GPU below, 100 MiB are the CPU memory beside it.\n'
	@printf 'The best policy for them is searched and predicted, then run; 1.000 in the last column is a perfect prediction.\n\n'
	$(BIN)/python -m runtime.bench $(DEMO_MODEL) --num-prompts 16
	$(call step,4. The check: 12 policies$(comma) good and bad ones$(comma) each predicted and then run (about two minutes))
	$(BIN)/python -m runtime.validate $(DEMO_MODEL) --runs 12 --max-seconds 8s --out $(DEMO_DIR)/validation.json --plot $(DEMO_DIR)/validation.png

test: lint ## check style, types and imports, then run the tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup

test-gpu: $(DEV) ## with a CUDA device: the tests that need one
	$(BIN)/python -m pytest -m gpu -ra tests

lint: $(DEV) ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(CORE) ## time the planner
	$(BIN)/python -m benchmarks.planning

# Ends with 75 where more calls are needed, which make reports as an error; the next call goes on.
bench-gpu: $(RUNTIME) ## with a CUDA device: profile it, then predicted against measured, 8 minutes a call
	$(BIN)/python -m benchmarks.gpu_loop --out $(BENCH_GPU_DIR)

notebooks: $(NOTEBOOKS) ## execute the notebooks: pages and figures in build/notebooks
	$(BIN)/python -m notebooks --out build/notebooks

clean: ## remove outputs and caches
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove the virtual environment as well
	rm -rf $(VENV)

# Planning needs the core only, so that a first result comes quickly; running adds torch, the tests add the tools.
$(CORE): $(REQUIREMENTS) | $(BIN)/pip
	$(INSTALL) --editable .
	@touch $@

$(RUNTIME): $(REQUIREMENTS) | $(BIN)/pip
	$(INSTALL) --editable '.[runtime]'
	@touch $(CORE) $@

$(NOTEBOOKS): $(REQUIREMENTS) | $(BIN)/pip
	$(INSTALL) --editable '.[notebooks]'
	@touch $(CORE) $@

$(DEV): $(REQUIREMENTS) | $(BIN)/pip
	$(INSTALL) --editable '.[dev]'
	@touch $(CORE) $(RUNTIME) $(NOTEBOOKS) $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; found = sys.version.split()[0]; sys.version_info < (3, 11) and sys.exit("tierwise needs Python 3.11 or newer, but $(PYTHON) is Python " + found + ". Name another one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
