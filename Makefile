# servegym: `make paper` runs the paper's comparison, `make test` the tests; both set up what they
# need first. `make help` lists the rest.

PYTHON ?= python3# the interpreter that .venv is made with, 3.11 or newer

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install -qq -c constraints.txt
SOURCES := envs agents baselines engines scripts tests

# A stamp is written when its step has ended well. It holds the checkout's path, because an editable
# install points there: a checkout that was moved or copied is set up again.
CORE := $(VENV)/.stamp-core
DEV := $(VENV)/.stamp-dev
KERNELS := $(VENV)/.stamp-kernels
ENGINE := $(VENV)/.stamp-engine
UNFINISHED := $(VENV)/.stamp-unfinished

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup paper cluster engine test lint format benchmark clean distclean FORCE

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(DEV) $(KERNELS) ## set up .venv for everything: run, train, test (PYTHON=python3.12 picks another interpreter)

paper: $(KERNELS) ## run the paper's comparison, into results/paper (sets up the core only, no torch)
	$(RUN) scripts/paper.py --output results/paper

cluster: $(KERNELS) ## compare the schedulers people know on five tasks, into results/cluster (core only, no torch)
	$(RUN) scripts/cluster.py --output results/cluster

engine: $(ENGINE) $(KERNELS) ## run policies on a real engine beside the simulator, into results/engine
	$(RUN) scripts/check_engine.py --output results/engine

test: $(DEV) $(KERNELS) ## run the tests
	$(RUN) -m pytest -n 2 --dist worksteal

lint: $(DEV) ## check style and types
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m mypy

format: $(DEV) ## format the code and mend what can be mended
	$(RUN) -m ruff check --fix-only $(SOURCES)
	$(RUN) -m ruff format $(SOURCES)

benchmark: $(KERNELS) ## measure speed, into results/benchmark
	$(RUN) scripts/benchmark.py

clean: ## remove caches and builds, keep .venv and results
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis $(KERNELS)
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# What follows is the set-up.

ifneq ($(shell cat $(CORE) 2>/dev/null && test -x $(RUN) && test ! -e $(UNFINISHED) || echo again),$(CURDIR))
$(CORE): FORCE
endif

$(CORE): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "servegym: no '$(PYTHON)' here; install Python 3.11 or newer, or name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "servegym: needs Python 3.11 or newer, '$(PYTHON)' is older; name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "servegym: '$(PYTHON)' cannot make virtual environments; install its venv package (Debian, Ubuntu: python3-venv)" >&2; exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
	    echo "servegym: creating .venv"; \
	    rm -rf $(VENV) && mkdir $(VENV) && touch $(UNFINISHED) && "$(PYTHON)" -m venv $(VENV); \
	fi
	@touch $(UNFINISHED)
	@echo "servegym: installing the core: numpy, numba, gymnasium, highspy and others (about a minute)"
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e .
	@rm $(UNFINISHED)
	@pwd >$@

$(DEV): $(CORE)
	@touch $(UNFINISHED)
	@echo "servegym: installing torch (the largest part, a few minutes)"
	@$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@echo "servegym: installing what training and testing need (about a minute)"
	@$(PIP) --no-build-isolation -e '.[train,tune,dev]'
	@rm $(UNFINISHED)
	@touch $@

$(ENGINE): $(CORE)
	@touch $(UNFINISHED)
	@echo "servegym: installing torch and transformers (a few minutes)"
	@$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@$(PIP) --no-build-isolation -e '.[engine]'
	@rm $(UNFINISHED)
	@touch $@

$(KERNELS): $(CORE) $(wildcard envs/*.py envs/*/*.py baselines/*.py baselines/*/*.py)
	@echo "servegym: compiling the simulator kernels (first run only, cached afterwards)"
	@$(RUN) -m servegym.baselines.warmup
	@touch $@
