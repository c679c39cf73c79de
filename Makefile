# `make demo` and `make test` need Python 3.10 or newer and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all lint bench

# pyproject.toml changed: install again into the same environment.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

# Learn the 5-step sampler, compare it with hand-made solvers, write table and picture to demo/.
demo: $(READY)
	$(BIN)/python recipes/demo.py --recipe recipes/digits_5.yaml --output demo --overwrite

test: $(READY)
	$(BIN)/python -m pytest -q

test-all: $(READY) lint
	$(BIN)/python -m pytest -q -m ""

# Time and memory; results in benchmarks/results. With a GPU: make bench BENCH="--device cuda --network cifar10 --precision bfloat16"
bench: $(READY)
	for part in learning sampling memory; do $(BIN)/python benchmarks/$$part.py $(BENCH) || exit 1; done
	$(BIN)/python benchmarks/fid.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
