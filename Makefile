# make demo    train a small mixture-of-experts language model (three minutes on two cores)
# make test    run the tests
# make bench   time each op beside plain PyTorch
# make lint    ruff, clang-format and mypy
# make wheel   a wheel in dist/
# make clean   remove what was built (.venv stays)
#
# Each makes .venv with the tested torch and this package where that has not been done yet. The
# package is installed in place: Python edits need no new install, C++ edits compile what changed.
# PYTHON=python3.12 chooses the Python, ARGS="..." adds arguments to the command.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD := pyproject.toml setup.py constraints.txt $(wildcard tools/b*.py)

.PHONY: demo test bench lint wheel clean

demo: $(VENV)/installed
	$(BIN)/sparsemoe demo $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

wheel: $(VENV)/torch
	$(PIP) wheel . --no-deps --wheel-dir dist

clean:
	rm -rf build dist python/*.egg-info python/sparsemoe/_C*.so
	rm -f $(VENV)/installed $(VENV)/installed-dev

$(VENV)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "sparsemoe needs Python 3.10 or later: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch -c constraints.txt
	touch $@

$(VENV)/installed: $(VENV)/torch $(BUILD) $(SOURCES)
	$(PIP) install -e '.[test]' -c constraints.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install -e '.[test,dev]' -c constraints.txt
	touch $@
