PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet

.PHONY: demo test test-zoo test-real check format models bench accuracy clean

# Everything from a fresh clone: environment, install, run.
demo: $(VENV)/demo
	$(BIN)/headrace demo

# Three tiers of tests, on all cores. The first needs no model and under three minutes on two cores.
PYTEST := $(BIN)/python -m pytest -n $(shell nproc) --durations=12

test: $(VENV)/dev
	$(PYTEST) -m "not zoo and not real and not stress"

# Every architecture, layout and field, and sweeps over sizes and damaged inputs; with the imports of the command.
test-zoo: $(VENV)/dev
	HEADRACE_TEST_SLIM=1 $(PYTEST) -m "zoo or stress"

test-real: $(VENV)/dev models
	HEADRACE_TEST_SLIM=1 $(PYTEST) -m real

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The real models that the tests need, kept in ~/.cache/headrace/models.
models: $(VENV)/dev
	$(BIN)/python benchmarks/models.py gemma-3-270m qwen-coder-0.5b >/dev/null

bench: $(VENV)/dev
	$(BIN)/python benchmarks/run.py

# The planner against measurements that it has not seen: docs/accuracy.md, and the constants it ships with. With DATA=more.csv: against those.
accuracy: $(VENV)/dev
	$(PIP) scipy==1.17.1
	$(BIN)/python benchmarks/accuracy.py $(if $(DATA),--data $(DATA))

# torch first and by its exact version: an open range could bring gigabytes of GPU libraries along.
$(VENV)/base:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/demo: $(VENV)/base pyproject.toml
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/dev: $(VENV)/base pyproject.toml requirements-dev.txt
	$(PIP) -e '.[demo,html]' -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
