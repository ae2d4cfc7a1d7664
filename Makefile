# Two commands set a fresh machine up: `make demo` and `make test`. Both build .venv once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
HOUSE  := wheelhouse

.PHONY: demo test lint coverage bench soak wheelhouse lock clean

demo: $(STAMP)
	$(BIN)/conclave simulate digits

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# Half as long again as `make test`: Python 3.11 traces every line.
coverage: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --cov --cov-report term:skip-covered
	$(BIN)/python tests/harness/untested.py

bench: $(STAMP)
	for script in benchmarks/*/*.py; do $(BIN)/python $$script --json || exit 1; done

soak: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Everything that a machine without a network needs to install Conclave.
wheelhouse: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check -c constraints.txt -w $(HOUSE) .

# The hashes of everything that `make test` installs. Not of torch, whose builds differ; it has to find the one for CPUs
# (UV_FIND_LINKS, or an index of these), or the lock would hold the libraries of another build. Tests compare it with the pins.
lock: $(STAMP)
	$(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --custom-compile-command 'make lock' \
	    --extra dev --no-emit-package torch --python-version 3.11 -c constraints.txt -o requirements-dev.lock pyproject.toml

# With LOCKED=1 nothing is installed whose hash is not in the lock, torch apart.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifdef LOCKED
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
else
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
endif
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
