# Each target sets up what it needs: an environment in .venv, made with Python's venv and pip alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-sanitize lint bench clean

# One stamp per set of extras, redone when pyproject.toml or the kernel changes.
$(VENV)/.installed-%: pyproject.toml $(wildcard nat_models/ops/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python scripts/demo.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

# The kernel built with ASan and UBSan, over its whole grid.
test-sanitize: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow tests/ops/test_native.py -k sanitizers

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror nat_models/ops/csrc/*.h nat_models/ops/csrc/*.cpp

bench: $(VENV)/.installed-demo
	mkdir -p output/bench
	set -e; for suite in op layer model step memory growth; do \
		$(BIN)/python scripts/benchmark.py $$suite --json output/bench/$$suite.json --plot output/bench/$$suite.png; \
	done

clean:
	rm -rf $(VENV) build demo output
