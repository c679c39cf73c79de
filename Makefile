# `make demo` and `make test` need Python 3.10 or newer and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all lint bench bench-chain benchmark-digits benchmark-glyphs

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

# A few files at a time, each on one core.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test: $(READY)
	$(PARALLEL)

test-all: $(READY) lint
	$(PARALLEL) -m ""

# Which loss, which parametrisation; then the headline. Hours on two cores; finished runs are kept, see recipes/README.md.
benchmark-digits: $(READY)
	for sweep in digits mixture; do \
		$(BIN)/python recipes/benchmark.py recipes/sweeps/$$sweep.yaml --output runs/benchmark-$$sweep || exit 1; \
	done

benchmark-glyphs: $(READY)
	$(BIN)/python recipes/benchmark.py recipes/sweeps/glyphs.yaml --output runs/benchmark-glyphs

# Time and memory; results go to benchmarks/results. An hour on one core, most of it in the last two.
bench: bench-chain
	for part in fid compare precision; do $(BIN)/python benchmarks/$$part.py || exit 1; done

# What depends on the machine most. On a GPU: make bench-chain BENCH="--device cuda --precision bfloat16 --network cifar10"
bench-chain: $(READY)
	for part in learning sampling memory; do $(BIN)/python benchmarks/$$part.py $(BENCH) || exit 1; done

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
