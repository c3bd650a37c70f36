# Onebase's everyday commands; `make help` lists them.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install serve test test-gpu check format bench

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

# On the machine as it is: torch, Triton, Transformers and pytest are enough, nothing is installed. The variable is what
# cuBLAS wants for results that repeat themselves.
test-gpu: export PYTHONPATH := kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
test-gpu: export CUBLAS_WORKSPACE_CONFIG := :4096:8
test-gpu: GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
test-gpu: ## Test the GPU's kernels on the GPU at hand, whole numbers first (PYTHON= if there is no .venv, ARGS=)
	$(GPU_PYTHON) -m pytest --confcutdir=tests/gpu tests/gpu $(ARGS)
	$(GPU_PYTHON) -m pytest --confcutdir=tests/kernels tests/kernels/triton tests/kernels/test_linear.py \
		tests/kernels/test_attention.py tests/kernels/test_elementwise.py -k triton $(ARGS)

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
