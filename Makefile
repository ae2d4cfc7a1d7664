# Two commands set a fresh machine up: `make demo` and `make test`. Both build .venv once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
HOUSE  := wheelhouse

.PHONY: demo test lint bench soak wheelhouse clean

demo: $(STAMP)
	$(BIN)/conclave simulate digits

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	for script in benchmarks/*/*.py; do $(BIN)/python $$script --json || exit 1; done

soak: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Everything that a machine without a network needs to install Conclave.
wheelhouse: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check -c constraints.txt -w $(HOUSE) .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
