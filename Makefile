# Every target does the set-up that it needs: on a fresh machine `make demo` and `make test` are all there is to type.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
OLDEST := .venv-oldest
# torch 2.6 brings gigabytes of CUDA packages: `make test-oldest OLDEST_TORCH=2.13.0` takes another build
OLDEST_TORCH ?= 2.6.0

# what the GPU's machine has installed, where `make setup` has not run
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_PART ?=

.PHONY: help setup demo test test-all test-oldest test-engines check format bench gpu kernels trial figures docs docs-serve build clean

help:
	@echo "make demo      train with and without dispersion loss, compare, report (4 to 6 minutes on 2 cores)"
	@echo "make test      the default tests"
	@echo "make check     ruff, mypy, import contracts"
	@echo "make test-all  the default and the slow tests"
	@echo "make test-oldest  a handful of tests and the quick demo with the oldest supported versions, in .venv-oldest"
	@echo "make test-engines  DeepSpeed on two processes and a local Ray cluster; installs both into .venv"
	@echo "make bench     the benchmarks; rows go to benchmarks/results/"
	@echo "make kernels   the Triton kernels compiled for four GPUs, none needed: registers, spills, shared memory"
	@echo "make gpu       on one GPU, under 9 minutes, resumable: tests, speed, memory (GPU_PART=attach: one part)"
	@echo "make trial     kills, damaged files and hostile folders: one table (4 to 15 minutes on 2 cores)"
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

# an environment of its own, installed as a user installs it
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet torch==$(OLDEST_TORCH) numpy==1.26.*
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt . pyarrow pandas pytest hypothesis
	$(OLDEST)/bin/python -m pip check
	$(OLDEST)/bin/python -m pytest -q -m "not slow and not gpu and not hub and not titan" tests/config tests/records tests/test_imports.py \
		tests/losses/test_api.py tests/attaching/test_attach.py tests/measuring/test_measure.py tests/studies/test_plan.py
	$(OLDEST)/bin/decondense demo --quick --out $(OLDEST)/demo
	$(OLDEST)/bin/decondense compare $(OLDEST)/demo
	$(OLDEST)/bin/decondense measure $(OLDEST)/demo/cells/dispersion/seed-0/final --out $(OLDEST)/measured --passages 8

# what the default tests skip because nothing installs it unasked
test-engines: $(STAMP)
	$(BIN)/python -m pip install --quiet wheel setuptools ninja py-cpuinfo hjson einops msgpack nvidia-ml-py "ray>=2.40"
	$(BIN)/python -m pip install --quiet --no-build-isolation deepspeed==0.19.8
	$(BIN)/python -m pytest -q tests/integrations/test_deepspeed.py tests/studies/test_cluster.py

check: $(STAMP)
	$(BIN)/ruff check src tests benchmarks docs/hooks
	$(BIN)/ruff format --check src tests benchmarks docs/hooks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix src tests benchmarks docs/hooks
	$(BIN)/ruff format src tests benchmarks docs/hooks

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_losses.py time --out benchmarks/results/losses-cpu.jsonl
	$(BIN)/python benchmarks/bench_measure.py --out benchmarks/results/measure.jsonl
	$(BIN)/python benchmarks/bench_attach.py --out benchmarks/results/attach.jsonl
	$(BIN)/python benchmarks/tables.py

kernels: $(STAMP)
	$(BIN)/python benchmarks/bench_kernels_static.py --jobs $(WORKERS) --out benchmarks/results/kernels-static.jsonl
	$(BIN)/python benchmarks/tables.py

# no set-up: it must run where nothing can be installed
gpu:
	code=0; export PYTHONPATH="src$${PYTHONPATH:+:$$PYTHONPATH}"; \
		$(GPU_PYTHON) benchmarks/gpu.py $(if $(GPU_PART),--parts $(GPU_PART)) || code=$$?; \
		$(GPU_PYTHON) benchmarks/tables.py \
		|| echo "the rows are written; fill the tables where matplotlib is installed: make figures"; exit $$code

trial: $(STAMP)
	$(BIN)/python benchmarks/trial.py --out benchmarks/results/trial.jsonl
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
