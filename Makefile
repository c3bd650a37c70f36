# Onebase's everyday commands; `make help` lists them.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What runs on a GPU: the virtual environment if there is one, else the machine's own Python, and nothing is installed.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# WHEELS= is a folder of wheels of what is missing, which are unpacked beside the checkout's build outputs.
GPU_PACKAGES := build/gpu-packages
GPU_PATH := kernels:server:adapters_store:$(GPU_PACKAGES)$(if $(PYTHONPATH),:$(PYTHONPATH))
UNPACK_WHEELS = $(if $(WHEELS),\
	$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target $(GPU_PACKAGES) $(WHEELS)/*.whl)

.DEFAULT_GOAL := help
.PHONY: help install serve test test-gpu check format bench bench-gpu

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Make .venv with pinned dependencies and the `onebase` command

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard kernels/onebase_kernels/cpu/*.cpp kernels/onebase_kernels/cpu/*.h)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

serve: install ## Serve the demo base and its three characters (HOST=, PORT=, ARGS=)
	@$(BIN)/onebase demo
	@exec $(BIN)/onebase serve --demo --host $(HOST) --port $(PORT) $(ARGS)

test: install ## Run the whole suite (ARGS= goes to pytest)
	@$(BIN)/onebase demo
	$(BIN)/python -m pytest $(ARGS)

# torch, Triton and pytest are enough for the kernels; the engine's test says what else it needs where it is skipped.
# The variable is what cuBLAS wants for results that repeat themselves.
test-gpu: export PYTHONPATH := $(GPU_PATH)
test-gpu: EXACT := tests/gpu/test_nf4_exact.py
test-gpu: export CUBLAS_WORKSPACE_CONFIG := :4096:8
test-gpu: ## Test kernels and engine on the GPU at hand (PYTHON= if there is no .venv, WHEELS= if packages are missing, ARGS=)
	$(UNPACK_WHEELS)
	@status=0; \
	$(GPU_PYTHON) -m pytest --confcutdir=tests/gpu $(EXACT) $(filter-out $(EXACT),$(wildcard tests/gpu/test_*.py)) $(ARGS) \
		|| status=$$?; \
	$(GPU_PYTHON) -m pytest --confcutdir=tests/kernels tests/kernels/triton tests/kernels/test_linear.py \
		tests/kernels/test_attention.py tests/kernels/test_elementwise.py -k triton $(ARGS) \
		|| status=$$(($$? > status ? $$? : status)); \
	exit $$status

check: install ## Lint (ruff) and type-check (mypy, strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## Time the demo server under a short load (ARGS= goes to `onebase bench`)
	@$(BIN)/onebase demo
	$(BIN)/onebase bench --demo $(ARGS)

# torch, Triton, Typer, Rich, psutil, Matplotlib and pydantic-settings are enough.
bench-gpu: export PYTHONPATH := $(GPU_PATH)
bench-gpu: ## Time the kernels on the GPU at hand, in the shapes of an 8B model (WHEELS= if packages are missing, ARGS=)
	$(UNPACK_WHEELS)
	$(GPU_PYTHON) -m onebase_server.commands.bench_kernels --device cuda --shape 8b $(ARGS)
