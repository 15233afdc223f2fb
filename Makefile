# Every target does its own set-up from a bare checkout and is safe to repeat; `make` prints this list.
#
#   make PYTHON=python3.12 ...   interpreter for a new .venv (else the first usable of python3, python3.11 ...)
#   make JOBS=4 test             test processes (2)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
JOBS ?= 2
PYTHON ?=
export PYTHON

# Small models: a test process with several threads only waits for its neighbours.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help quickstart test test-real check test-gpu bench docs lint format setup clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) \
		| while IFS='|' read -r name text; do printf 'make %-11s %s\n' "$$name" "$$text"; done

quickstart: setup ## from the standard library's source to a trained, measured and exported model
	@scripts/quickstart.sh

test: lint ## style, types and all tests but those that need outside programs
	$(PYTEST) -m "not real" -n $(JOBS) --dist worksteal

check: lint ## style, types and the quick tests, in about a minute and a half
	$(PYTEST) -m "not slow and not real" -n $(JOBS) --dist worksteal

test-real: setup ## the quickstart, then the tests with outside programs (a browser, OpenCode, llama.cpp, clients ...) and of what it left
	@scripts/install_test_programs.sh
	@scripts/build_llama_cpp.sh >/dev/null
	@scripts/install_lm_eval.sh >/dev/null
	@scripts/install_clients.sh >/dev/null
	$(MAKE) quickstart
	$(PYTEST) -m real
	$(PYTEST) tests/base/test_sandbox.py

test-gpu: setup ## the tests that need a CUDA device; fails where there is none
	SMELTER_REQUIRE_GPU=1 $(PYTEST) -m gpu

bench: setup ## every benchmark that needs no GPU, in its quick form
	@for file in benchmarks/*.py; do \
		case $$file in */contestants.py | */study.py | */train_gpu.py) continue ;; esac; \
		echo "== $$file"; $(BIN)/python "$$file" --quick; \
	done

docs: setup ## the documentation as a site: site/index.html, which needs no network
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: setup ## style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: ## .venv with the pinned packages (at once if it is there already)
	@scripts/setup_venv.sh

clean: ## remove .venv and caches; data/ and runs/ stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
