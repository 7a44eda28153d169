# `make demo` and `make test` need nothing before them but Python >= 3.10, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*)
# The ordinary CUDA build: it runs on a CPU too.
PINS := torch==2.11.0 torchvision==0.26.0 triton==3.6.0

# Tests use one thread each; a process of them takes up to 2 GB.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist worksteal

.PHONY: all demo test coverage test-all lint format docs bench gpu doctor clean
all: $(VENV)/.ready

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("movae-fast needs Python >= 3.10: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install -q $(PINS)
	$(BIN)/pip install -q -e .
	touch $@

# One installation, not that of .ready and another on top: each compiles the extension.
$(VENV)/.ready-dev: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install -q $(PINS)
	$(BIN)/pip install -q -e '.[dev]'
	touch $(VENV)/.ready $@

demo: $(VENV)/.ready
	$(BIN)/movae train --config demo

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not gpu'

# The same tests, and that they run nine lines of ten. Before Python 3.12 counting lines takes a tiny training run
# twice its CPU time; from there on the interpreter counts them itself (sysmon).
coverage: $(VENV)/.ready-dev
	COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not gpu' --cov=movae_fast --cov-report=term:skip-covered --cov-fail-under=90

test-all: $(VENV)/.ready-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not gpu'

gpu: $(VENV)/.ready-dev
	$(BIN)/movae doctor --gpu
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks.run

bench: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.run

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/ as site/; a broken link fails.
docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

doctor: $(VENV)/.ready
	$(BIN)/movae doctor

clean:
	rm -rf build dist site *.egg-info movae_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
