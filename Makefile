# make demo | make test | make check: all that a newcomer and CI need. Only Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STORE ?= ./prunery-store
# Files are spread over processes; `make test PYTEST_ARGS=` runs them in one.
PYTEST_ARGS ?= -n logical --maxprocesses 4 --dist loadfile

export HF_HUB_OFFLINE ?= 1
export PREFECT_LOGGING_LEVEL ?= WARNING

.PHONY: demo test check format clean

demo: $(STAMP)
	$(BIN)/prunery run rag --store $(STORE)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP) .types/prunery
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p prunery
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_house.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pins hold the versions that this tree was tested with; torch first, so that a machine
# with a CPU build at hand takes that one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "prunery needs Python 3.11 or later; found %s. Run: make PYTHON=python3.11" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# mypy reads the package by its name; the root is the package, hence a link to it.
.types/prunery:
	mkdir -p .types
	ln -sfn .. $@

clean:
	rm -rf $(VENV) .types build *.egg-info
