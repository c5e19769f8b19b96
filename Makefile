# Every target does its own set-up on a bare Debian or Ubuntu with Python 3.11 or later.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs bench clean
SHELL := /bin/bash
BIN := .venv/bin
DEV := cli,train,vision,text,rl,report,cluster,studies,peers,dev
OUT ?= runs/demo
WHICH = not slow

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

demo: ## Run every study at quick scale and write one report
	@tools/setup.sh cli,train,report,studies
	@$(BIN)/outlast demo --out $(OUT)

test: ## Run the tests
	@tools/setup.sh $(DEV)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered -m "$(WHICH)" \
	  --jaxtyping-packages=outlast.data,outlast._core,outlast.diagnose,outlast.adapt,outlast.continual,outlast.multitask,outlast.fewshot,outlast.attention._favor,outlast.attention._rfa,outlast.attention._error,outlast.robust._invariance,outlast.robust._group_inference,shape_checker.arrays_only $(ARGS)

test-all: ## Run the tests, those that take minutes too
	@$(MAKE) --no-print-directory test WHICH=

lint: ## Check style, types and the direction of imports
	@tools/setup.sh $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports

docs: ## Build the documentation into site/
	@tools/setup.sh docs
	@$(BIN)/zensical build --clean --strict

bench: ## Measure against the named peers; write benchmarks/results/ and docs/benchmarks.md
	@tools/setup.sh $(DEV)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

clean: ## Remove what make made, results excepted
	rm -rf .venv site dist .pytest_cache .ruff_cache .coverage
