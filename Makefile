# Every target does its whole set-up: a virtual environment with stent, the embedded
# Postgres and the development tools, made once and kept until pyproject.toml changes.
#
#   PYTHON=/path/to/python   the interpreter to use, 3.11 or newer
#   VENV=directory           where the environment goes
#   POSTGRES="15 16"         servers of test-postgres: versions, program directories, URLs
#   PYTEST_ARGS='...'        more arguments for pytest

SHELL := /bin/sh
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
PYTHON ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
TIME ?= 60
SEED ?=
MATRIX ?= 3.11 3.12 3.13
POSTGRES ?= 15 16 17 18

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := stent workers tests benchmarks
PYTEST := $(BIN)/python -m pytest
# Over the processors, and who has nothing left takes from the others.
SPREAD := -n auto --dist worksteal
# What depends on the event loop of the worker runs under uvloop too.
LOOP_TESTS = $(wildcard tests/unit/test_loop*.py tests/unit/test_replay*.py)

# The environment is the project's own: nothing of the caller's may leak into it.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PIP_REQUIRE_VIRTUALENV := 0

POSTGRES_TESTS = --ignore tests/postgres/test_embedded.py tests/postgres \
  tests/e2e/test_kill_workers.py tests/e2e/test_lost_database.py

.PHONY: help demo test test-loop test-matrix test-postgres check format bench bench-peers \
  soak kill-points clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | \
	  while IFS= read -r line; do \
	    printf '  make %-13s %s\n' "$${line%%:*}" "$${line##*## }"; \
	  done

demo: $(STAMP) ## run the flights job on two workers, kill one, count the rows
	@$(BIN)/python -m workers.flights.demo

test: $(STAMP) ## run all tests under asyncio, loop and replay under uvloop too
	@$(PYTEST) $(SPREAD) tests $(PYTEST_ARGS)
	@$(PYTEST) $(SPREAD) --loop uvloop $(LOOP_TESTS) $(PYTEST_ARGS)

test-loop: $(STAMP)
	@$(PYTEST) $(SPREAD) tests/unit tests/test_architecture.py $(PYTEST_ARGS)
	@$(PYTEST) $(SPREAD) --loop uvloop $(LOOP_TESTS) $(PYTEST_ARGS)

test-matrix: ## run the tests that need no database on every installed Python
	@status=0; \
	for version in $(MATRIX); do \
	  found=; \
	  for candidate in "python$$version" \
	      "$$HOME"/.pyenv/versions/"$$version"*/bin/python; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; \
	        sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])' \
	        "$$version" >/dev/null 2>&1; then \
	      found=$$candidate; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "Python $$version: not installed, skipped"; continue; \
	  fi; \
	  echo "Python $$version: $$found"; \
	  $(MAKE) test-loop PYTHON="$$found" VENV=".venv-$$version" || status=1; \
	done; \
	exit $$status

test-postgres: $(STAMP) ## run the tests of the database on POSTGRES: versions or a URL
	@status=0; \
	for place in $(POSTGRES); do \
	  echo "PostgreSQL $$place:"; \
	  $(PYTEST) $(SPREAD) --postgres "$$place" $(POSTGRES_TESTS) $(PYTEST_ARGS) || status=1; \
	done; \
	exit $$status

check: $(STAMP) ## check format, lint and types
	@status=0; \
	$(BIN)/ruff format --check $(CODE) || status=1; \
	$(BIN)/ruff check $(CODE) || status=1; \
	$(BIN)/mypy --strict $(CODE) || status=1; \
	exit $$status

format: $(STAMP) ## format the code and apply the safe fixes of the linter
	@$(BIN)/ruff check --fix-only $(CODE)
	@$(BIN)/ruff format $(CODE)

bench: $(STAMP) ## run the benchmark; BENCH_ARGS chooses workloads
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-peers: $(STAMP) ## run others beside stent, on the same server; BENCH_ARGS
	@$(BIN)/python -m benchmarks.peers $(BENCH_ARGS)

soak: $(STAMP) ## work under random faults; TIME=seconds, SEED=number
	@$(BIN)/python -m tests.e2e.soak --time $(TIME) $(if $(SEED),--seed $(SEED))

kill-points: $(STAMP) ## kill a worker and Postgres at every write; minutes
	@STENT_KILL_POINTS=all $(PYTEST) -s tests/e2e/test_kill_points.py $(PYTEST_ARGS)

clean: ## remove environments and caches; the data under .stent stays
	rm -rf .venv .venv-3.* build dist *.egg-info
	rm -rf .bench-peers .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

# pip learned dependency groups in 25.1; the one a Python brings may be older.
$(STAMP): pyproject.toml
	@PYTHON='$(PYTHON)' sh .ci/make-venv '$(VENV)'
	@echo 'Installing stent and its tools into $(VENV); once, about a minute.'
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --editable '.[local,uvloop]' --group dev
	@touch $@
