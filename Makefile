# Each target is enough by itself on a machine with Python >= 3.11, make and git:
# it creates .venv, installs the tested versions into it, and runs.
#
#   make demo     every kernel on the benchmark case (GPU) or its miniature (simulator)
#   make test     the whole test suite
#   make lint     ruff and pyright
#
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/numba-fused demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
	         "Name another: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The stamps are newer than what they were installed from, so a second run starts at once.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[cuda13]' --constraint constraints.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,cuda13]' --constraint constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
