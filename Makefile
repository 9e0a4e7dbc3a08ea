# Everything starts here: `make demo`, `make test`. Both install what they need into .venv first.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
RUNNABLE := $(VENV)/.runnable
INSTALLED := $(VENV)/.installed
SOFTWARE := $(VENV)/software/.installed
WORKERS ?= 2

.PHONY: help install demo test lint types unit soak bench lock clean

help:
	@echo "make demo   a sample agent, a real S3 server, a lost host, a recovery: under a minute"
	@echo "make test   everything that has to hold: lint, types, imports, all tests"
	@echo "make soak   200 snapshots of each kind of busy agent, each proven one instant: two minutes"
	@echo "make bench  peak memory and times with a 700 MB agent"
	@echo "make lock   resolve the dependencies anew into the lock files"
	@echo "make clean  remove what the above have made"

# The virtual environment needs no pip of its own: python3-venv may be missing on a fresh machine.
PIP := $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet --disable-pip-version-check --no-compile

$(RUNNABLE): requirements-demo.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "agentkeep needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	@echo "installing into $(VENV)"
	@$(PYTHON) -m venv --clear --without-pip $(VENV)
	@$(PIP) --require-hashes -r requirements-demo.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(INSTALLED): $(RUNNABLE) requirements-dev.lock
	@echo "installing what the tests need"
	@$(PIP) --require-hashes -r requirements-dev.lock
	@touch $@

# What agents keep their memory with, in an environment of its own: none of it is to change ours.
$(SOFTWARE): $(INSTALLED) requirements-software.lock
	@echo "installing software of others into $(VENV)/software"
	@$(PYTHON) -m venv --clear --without-pip $(VENV)/software
	@$(PYTHON) -m pip --python $(VENV)/software/bin/python install --quiet --disable-pip-version-check \
		--no-compile --require-hashes -r requirements-software.lock
	@touch $@

install: $(INSTALLED) $(SOFTWARE)

demo: $(RUNNABLE)
	@$(RUN) demo

test: $(INSTALLED) $(SOFTWARE) lint types
	@.ci/system-packages
	@$(RUN) pytest -n $(WORKERS) --dist worksteal

lint: $(INSTALLED)
	@$(RUN) ruff check
	@$(RUN) ruff format --check --quiet
	@$(VENV)/bin/lint-imports --no-logo > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }

types: $(INSTALLED)
	@$(RUN) mypy

# Of the agents in tests/stress, of which `make test` takes fewer snapshots.
SNAPSHOTS ?= 200
soak: $(INSTALLED)
	@.ci/system-packages
	@AGENTKEEP_STRESS_SNAPSHOTS=$(SNAPSHOTS) $(RUN) pytest tests/stress --timeout 3600 --durations 0 -vv

bench: $(RUNNABLE)
	@$(RUN) benchmarks.memory

# Needs uv on the PATH. Without index addresses, so that any registry will do.
LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-annotate --upgrade

lock:
	@$(LOCK) pyproject.toml -o requirements.lock
	@$(LOCK) pyproject.toml -o requirements-demo.lock --extra demo
	@$(LOCK) pyproject.toml -o requirements-dev.lock --extra dev
	@$(LOCK) --group software -o requirements-software.lock

clean:
	rm -rf $(VENV) .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
