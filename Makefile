# Each target installs what it needs. PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install serve test test-slow check bench clean

install: $(VENV)/.serve
$(VENV)/.serve: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.serve

serve: $(VENV)/.serve  ## fetch the demo model once, then serve it on 127.0.0.1:8000 until Ctrl-C
	$(BIN)/octavo fetch demo
	$(BIN)/octavo serve deployments/config.yaml

test: $(VENV)/.dev  ## the tests; the minutes-long ones are in test-slow
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev  ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.serve  ## tokens per second of the demo model and of the reference model, in this process
	$(BIN)/octavo fetch demo
	$(BIN)/octavo fetch reference
	$(BIN)/octavo bench --model demo
	$(BIN)/octavo bench --model reference

clean:
	rm -rf $(VENV) build dist *.egg-info
