# make demo: train a small value network and steer a larger model with it.  make test: everything is checked.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin

.PHONY: help setup demo test release bench transfer lint format clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup:  ## create .venv and install everything (CPU build of vLLM unless there is an NVIDIA GPU)
	@bash requirements/install.sh

demo: setup  ## train a value network on a small model, serve it beside a larger one, print the accuracies
	@$(BIN)/python -m ivl_vllm.demo

test: setup  ## run all tests
	@$(BIN)/python -m pytest tests --numprocesses auto --dist loadfile --no-loadscope-reorder

RELEASE := 0.31.0
release: setup  ## run the parity suites on another release of vLLM: make release RELEASE=0.29.0
	@bash tests/on_release.sh $(RELEASE)

bench: setup  ## throughput against plain vLLM, the limit and every peer (long)
	@$(BIN)/python benchmarks/throughput.py
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python benchmarks/throughput.py --scale gpu-peers; fi
	@$(BIN)/python benchmarks/readme.py

transfer: setup  ## train a family of small models and measure how far value networks transfer (an hour)
	@$(BIN)/python benchmarks/transfer.py
	@$(BIN)/python benchmarks/readme.py

lint: setup  ## check style and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup  ## mend style and format
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## remove .venv and caches
	@rm -rf .venv .venv-* .cache build *.egg-info
