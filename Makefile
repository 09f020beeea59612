# Everything runs in .venv, which the first target that needs it creates. PYTHON chooses the Python it is made with; a torch
# of the supported range that this Python already has is kept (see tools/make_env.py).
PYTHON ?= python3
VENV ?= .venv
TEST_WORKERS ?= 2
PYTEST_ARGS ?=
TEST_MARKS ?= not slow
BENCH_ARGS ?=
DEMO_ARGS ?=

# Tools that the environment borrows from PYTHON's packages have their commands beside that Python.
export PATH := $(abspath $(VENV))/bin:$(patsubst %/,%,$(dir $(shell command -v $(PYTHON)))):$(PATH)

STAMP := $(VENV)/.installed
CSRC := $(wildcard csrc/*.* csrc/*/*.*)
BUILD_INPUTS := pyproject.toml setup.py tools/make_env.py $(wildcard requirements/*.txt) $(CSRC)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install the project and its tools

demo: $(STAMP)  ## train a small DiT-MoE on real images and sample from it into demo/
	$(VENV)/bin/dit-moe demo --out demo $(DEMO_ARGS)

test: $(STAMP)  ## run the tests but for the slow ones (TEST_MARKS= runs them too; those that need a GPU are skipped without one)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) -m "$(TEST_MARKS)" $(PYTEST_ARGS)

lint: $(STAMP)  ## check style, formatting and types
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CSRC)
	$(VENV)/bin/python -m mypy

format: $(STAMP)  ## rewrite the files as lint wants them
	ruff check --fix .
	ruff format .
	clang-format -i $(CSRC)

bench: $(STAMP)  ## a short benchmark on the machine at hand
	$(VENV)/bin/python -m benchmarks.run $(BENCH_ARGS)

clean:  ## remove .venv, build products and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find kernels dit_moe benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
	rm -f kernels/dit_moe_kernels/_C*.so

$(STAMP): $(BUILD_INPUTS)
	$(PYTHON) tools/make_env.py --venv $(VENV)
	@touch $@
