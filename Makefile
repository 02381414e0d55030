.PHONY: demo test test-fast test-heavy durations docs check types types-of-windows format clean

PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo
WORKERS := -n logical --maxprocesses 8  # each with one thread, whose sums are the same on any machine
BY_FILE := $(WORKERS) --dist loadfile --no-loadscope-reorder
export OMP_NUM_THREADS ?= 2
export PYTHONDONTWRITEBYTECODE =  # tests start many processes, each of which would compile the package anew

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] < (3, 15), "dinoseg needs Python 3.11 to 3.14: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

demo: .venv/installed  ## render, prepare, train, evaluate, predict on a video
	$(BIN)/python -m dinoseg mode=render data=sarrarp data.root=$(DEMO)/data
	$(BIN)/python -m dinoseg mode=prepare data=sarrarp data.root=$(DEMO)/data
	rm -rf $(DEMO)/train $(DEMO)/eval $(DEMO)/predict
	$(BIN)/python -m dinoseg mode=train hparam=demo hydra.run.dir=$(DEMO)/train
	$(BIN)/python -m dinoseg mode=predict resume=$(DEMO)/train input=$(DEMO)/data/test/video_65/video_left.avi hydra.run.dir=$(DEMO)/predict
	$(BIN)/python -m dinoseg mode=eval resume=$(DEMO)/train hydra.run.dir=$(DEMO)/eval

test: .venv/installed  ## all tests but the heavy ones and those of a GPU
	$(BIN)/python -m pytest $(BY_FILE) -m "not heavy"

test-heavy: .venv/installed  ## browsers (Debian: apt-get install chromium), exports, wheels, docs, what is long
	$(BIN)/python -m pytest $(BY_FILE) -m heavy

test-fast: .venv/installed  ## what takes no process and no second each: the loop while coding
	$(BIN)/python -m pytest $(WORKERS) --dist worksteal -q -m "not slow and not heavy" --durations=20 --durations-min=1

durations: .venv/installed  ## CPU seconds of each test of `make test`; the slowest fifty go into CONTRIBUTING.md
	mkdir -p outputs
	PYTHONPATH=tests $(BIN)/python -m pytest -p durations --cpu-durations outputs/durations.csv $(BY_FILE) -m "not heavy"
	$(BIN)/python tests/durations.py outputs/durations.csv CONTRIBUTING.md

docs: .venv/installed  ## the pages of docs/ as a site in outputs/site, which needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: .venv/installed  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --no-print-directory --jobs 2 types types-of-windows

types:
	$(BIN)/mypy

types-of-windows:
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32  # what Windows lacks

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv outputs/*
