# Two commands for a newcomer: `make demo` and `make test`. Everything else is `dvc` and `sonify`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1

.PHONY: install install-dev demo experiments test test-full lint types docs services services-stop services-status services-check services-test check clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-services: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[services,postgresql,demo]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.installed

demo: install  ## virtual env, pinned install, weights, `dvc repro`, prints where the report is
	dvc repro
	sonify report
	@echo "To go on in this shell: source $(VENV)/bin/activate"

experiments: install  ## experiments of DVC: what differs between them, without intervals and files, so that it fits a terminal
	dvc exp show --only-changed --drop '.*(/|_low$$|_high$$)'

test: install-dev  ## everything the tests need, then the tests
	pytest -n 3 --dist worksteal -m "not services and not full"

test-full: install-dev  ## what only presets full and full-ray use: the preset itself, Ray, several processes, 8-bit integers
	pytest -n 2 --dist worksteal -m full

lint: install-dev
	ruff check .
	ruff format --check .
	codespell

types: install-dev
	mypy

docs: install-dev  ## this site into build/docs, offline, with warnings as errors
	sphinx-build -q -W --keep-going -E -b html docs build/docs
	@echo "Documentation: build/docs/index.html"

services: $(VENV)/.installed-services  ## PostgreSQL, object store, MLflow, Prefect, report page, demo page, worker as plain processes
	python -m infra.services start

services-stop:
	python -m infra.services stop

services-status:
	python -m infra.services status

services-check: install-dev  ## the services on a calm day: doors, a scheduled run, an approval, passwords
	pytest -p no:xdist -rs -m services tests/services

services-test: install-dev  ## all of it: outages, kill -9, backup, pages in a browser; thirteen minutes on two quiet cores
	SERVICES_TEST=whole pytest -p no:xdist -rs tests/infra tests/services

check: lint types docs test test-full services-check  ## what CI runs

clean:
	rm -rf $(VENV) .cache .runs error.json
