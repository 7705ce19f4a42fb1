# Two commands for a newcomer: `make demo` and `make test`. Everything else is `dvc` and `sonify`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1

.PHONY: install install-dev demo test lint types check clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.installed

demo: install  ## virtual env, pinned install, weights, `dvc repro`, prints where the report is
	dvc repro
	sonify report

test: install-dev  ## everything the tests need, then the tests
	pytest -n 2 --dist worksteal

lint: install-dev
	ruff check .
	ruff format --check .

types: install-dev
	mypy

check: lint types test  ## what CI runs

clean:
	rm -rf $(VENV) .cache .runs error.json
