# Every target does the set-up that it needs: on a fresh machine `make demo` and `make test` are all there is to type.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: help setup demo test test-all check format bench figures docs docs-serve build clean

help:
	@echo "make demo      train with and without dispersion loss, compare, report (4 to 6 minutes on 2 cores)"
	@echo "make test      the default tests"
	@echo "make check     ruff, mypy, import contracts"
	@echo "make test-all  the default and the slow tests"
	@echo "make bench     the benchmarks; rows go to benchmarks/results/"
	@echo "make figures   the README's figure and every generated table, from committed rows"
	@echo "make docs      the documentation, into site/ (docs-serve: on a local port, rebuilt on every change)"
	@echo "make build     wheel and source distribution"

setup: $(STAMP)

# torch first and alone: the constraint picks the build that the machine's index offers
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,kernels,frameworks,eval,docs]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/decondense demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not gpu and not hub and not titan"

test-all: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not gpu and not hub"

check: $(STAMP)
	$(BIN)/ruff check src tests benchmarks docs/hooks
	$(BIN)/ruff format --check src tests benchmarks docs/hooks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix src tests benchmarks docs/hooks
	$(BIN)/ruff format src tests benchmarks docs/hooks

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_losses.py
	$(BIN)/python benchmarks/bench_measure.py
	$(BIN)/python benchmarks/bench_attach.py
	$(BIN)/python benchmarks/tables.py

figures: $(STAMP)
	$(BIN)/python benchmarks/tables.py

docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(STAMP)
	$(BIN)/python -m mkdocs serve

build: $(STAMP)
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
