# Each target sets up what it needs: an environment in .venv, made with Python's venv and pip alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Python 3.10 where it is found, also as one of pyenv's.
PYTHON_OLDEST ?= $(firstword $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null; \
	ls ~/.pyenv/versions/3.10.*/bin/python 2>/dev/null; echo python3))
PYTHON_NEWEST ?= $(PYTHON)
# What is held against the oldest and the newest dependencies: all that works without extras.
PROGRAMS := training commands scripts test_cli.py test_export.py test_docs.py
CORE_TESTS := -m "not slow" $(PROGRAMS:%=--ignore=tests/%)

.PHONY: demo demo-segment demo-detect test test-slow test-timm test-sanitize test-oldest test-newest mutate lint bench clean

# One stamp per set of extras, redone when pyproject.toml or the kernel changes.
$(VENV)/.installed-%: pyproject.toml $(wildcard nat_models/ops/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python scripts/demo.py

demo-segment: $(VENV)/.installed-demo
	$(BIN)/python -m scripts.demo_segment

demo-detect: $(VENV)/.installed-demo
	$(BIN)/python -m scripts.demo_detect

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadgroup

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

# timm's own tests of its models, on ours. Needs the registry.
test-timm: $(VENV)/.installed-test
	$(BIN)/python scripts/timm_tests.py

# The kernel built with ASan and UBSan, over its whole grid and under random direct calls.
test-sanitize: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow tests/ops/test_native.py tests/ops/test_direct_calls.py -k sanitizers

# The bounds that pyproject.toml declares: exactly the lowest versions, then the newest that there are today.
.venv-oldest/.installed: pyproject.toml scripts/bounds.py $(wildcard nat_models/ops/csrc/*)
	rm -rf .venv-oldest
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --upgrade pip
	.venv-oldest/bin/pip install --quiet --no-deps --editable .
	.venv-oldest/bin/python scripts/bounds.py > .venv-oldest/bounds.txt
	cat .venv-oldest/bounds.txt
	.venv-oldest/bin/pip install --quiet --requirement .venv-oldest/bounds.txt pytest
	.venv-oldest/bin/pip check
	touch $@

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest $(CORE_TESTS)

test-newest:
	test -x .venv-newest/bin/python || $(PYTHON_NEWEST) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade pip
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable . pytest
	.venv-newest/bin/python -m pytest $(CORE_TESTS)

# Which changes of the code no test notices, by the settings in pyproject.toml: an hour on two cores. The package is not
# installed editable here: its hook would import the checkout in place of the mutants.
mutate:
	test -x .venv-mutate/bin/python || $(PYTHON) -m venv .venv-mutate
	.venv-mutate/bin/pip install --quiet '.[test]' mutmut
	OMP_NUM_THREADS=1 .venv-mutate/bin/mutmut run --max-children 2
	.venv-mutate/bin/mutmut results

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror nat_models/ops/csrc/*.h nat_models/ops/csrc/*.cpp

bench: $(VENV)/.installed-demo
	mkdir -p output/bench
	set -e; for suite in op layer model step memory growth; do \
		$(BIN)/python -m scripts.benchmark $$suite --json output/bench/$$suite.json --plot output/bench/$$suite.png; \
	done

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-mutate mutants build demo output
