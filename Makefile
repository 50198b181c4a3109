# Everything that a checkout needs; `make setup` makes .venv, and the other targets make it first.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: setup quickstart test check lint clean

setup: .venv/installed

# torch first and by its own version: asked for by a range, an index may answer with gigabytes for another device.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/dlm-ray quickstart $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

# Also what takes minutes.
check: setup
	$(BIN)/python -m pytest -m '' $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell dlm_ray evaluation tests configs cluster README.md Makefile pyproject.toml

clean:
	rm -rf .venv build dist *.egg-info
