# make demo: sees images from the plain and the accelerated pipeline, measured; make test: the whole suite.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test fast lint tables docs clean

demo: $(STAMP)
	$(BIN)/diffaccel demo --out out/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tables: $(STAMP)  # docs/zoo.md, compatibility.md, benchmarks.md, *-table.md and overview.png from benchmarks/*.json
	$(BIN)/python benchmarks/zoo_tables.py tables
	$(BIN)/python benchmarks/guidance.py tables
	$(BIN)/python benchmarks/disa.py tiny-fashion-mar tables
	$(BIN)/python benchmarks/students.py tables
	$(BIN)/python benchmarks/compatibility.py tables
	$(BIN)/python benchmarks/combination.py tables
	$(BIN)/python benchmarks/few_evaluations.py tiny-fashion-dit tables
	$(BIN)/python benchmarks/auto.py tiny-fashion-dit tables
	$(BIN)/python benchmarks/peers.py tables
	$(BIN)/python benchmarks/overview.py

docs: $(STAMP)  # the site, with the API reference: out/site/index.html
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m mkdocs build --strict

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info
