# Onebase's everyday commands; `make help` lists them.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install serve test check format bench

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
