# make demo   compare small batch, accumulation and native large batch, and write a report
# make test   run the tests
# Both make their own .venv first and need nothing but Python 3.11 or later with its venv module.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Two processes, each with whole files of tests, in their order: what a file sets up for all its tests is set up once.
# A process that ends early is not started again: a test that hangs ends it after every stack was printed.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check format bench clean

demo: $(INSTALLED)
	@$(BIN)/macrobatch compare --task code-lm --threads 1 --output runs/demo

test: $(INSTALLED)
	@$(PYTEST)

# Everything: formatting, lint, types, and all tests, the slow ones included (docs are executed by tests/test_docs.py).
check: $(INSTALLED)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --strict src
	@$(PYTEST) -m ""

format: $(INSTALLED)
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

bench: $(INSTALLED)
	@$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf .venv runs dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that the build the constraint names is settled before anything else asks for torch.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "macrobatch needs Python 3.11 or later with venv; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing torch and the tools into .venv: once, 1 to 10 minutes depending on the network, about 1.6 GB on disk (more with a CUDA build of torch)."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
