# Every target sets up what it needs: a virtual environment in .venv, made from pyproject.toml.
# Needs Python 3.11 or later; `make PYTHON=/path/to/python test` names one.

VENV       ?= .venv
PYTHON     ?=
ARGS       ?=
# A process takes a gigabyte or two.
JOBS       ?= --numprocesses auto --maxprocesses 4
BIN        := $(VENV)/bin
USER_STAMP := $(VENV)/.ready-user
DEV_STAMP  := $(VENV)/.ready-dev
DOCS_STAMP := $(VENV)/.ready-docs
SPHINX     := $(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --write-all --quiet
SOURCES    := ckptsched models examples benchmarks tests tooling
USER_EXTRAS := test,plot,examples
# The models of tests/zoo ask for newer versions than the oldest.
TEST_EXTRAS := $(USER_EXTRAS),zoo
comma := ,

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo demo-small bench test test-fast test-oldest lint format types hooks docs docs-links ci clean distclean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed 's/:.*## /\t/' | expand -t 14

setup: $(USER_STAMP) ## Make .venv with all that the demo and the tests need

setup-dev: $(DEV_STAMP) ## Make .venv with the tools for lint, types and hooks, too

demo: $(USER_STAMP) ## Train a small ODE network under a byte budget and report what it took
	$(BIN)/python -m examples.demo $(ARGS)

demo-small: $(USER_STAMP) ## The demo at a size that shows only that it runs
	$(BIN)/python -m examples.demo --small $(ARGS)

bench: $(USER_STAMP) ## Measure budgets, overheads and gradients on the paper's networks (long)
	$(BIN)/python -m benchmarks.budgets $(ARGS)

test: $(USER_STAMP) ## Run all tests; ARGS="-k budget" picks some
	$(BIN)/python -m pytest $(JOBS) $(ARGS)

test-fast: $(USER_STAMP) ## Run the tests that are not marked slow
	$(BIN)/python -m pytest $(JOBS) -m "not slow" $(ARGS)

test-oldest: ## Run all tests on the oldest versions that pyproject.toml admits, in .venv-oldest
	$(MAKE) VENV=.venv-oldest PYTHON=$(or $(PYTHON),python3.11) .venv-oldest/.ready-oldest
	.venv-oldest/bin/python -m pytest $(JOBS) $(ARGS)

lint: $(DEV_STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_STAMP) ## Mend what can be mended of style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_STAMP) ## Check types
	$(BIN)/mypy

hooks: $(DEV_STAMP) ## Run lint and types before every commit
	$(BIN)/pre-commit install

docs: $(DOCS_STAMP) ## Build the site of these pages, in build/docs
	$(SPHINX) -b html docs build/docs

docs-links: $(DOCS_STAMP) ## Ask the net whether what the site links to is there
	$(SPHINX) -b linkcheck docs build/docs-links

ci: ## What guards the main branch: everything, from a fresh clone of the committed tree
	.ci/run

clean: ## Remove caches and build outputs
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -type d -name __pycache__ -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## Remove .venv as well
	rm -rf $(VENV) .venv-oldest

# $(call install,EXTRAS): one pip call into .venv, which is made where there is none that works. With
# CONSTRAINTS, a file of pip's, versions are held to those.
define install
	@set -e; start=$$(date +%s); \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  found=; \
	  for python in $(PYTHON) python3 python python3.14 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	      found=$$python; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'No Python 3.11 or later found; name one: make PYTHON=/path/to/python' >&2; exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV) || { \
	    echo 'This Python cannot make virtual environments (on Debian and Ubuntu: install' \
	      'python3-venv)' >&2; exit 1; }; \
	fi; \
	echo 'Installing (PyTorch is several GB; this happens once)'; \
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$(1)]' \
	  $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)); \
	echo "Set up in $$(( $$(date +%s) - start )) s"
endef

$(USER_STAMP): pyproject.toml
	$(call install,$(TEST_EXTRAS))
	@touch $@

$(DEV_STAMP): pyproject.toml
	$(call install,dev$(comma)zoo)
	@touch $@ $(USER_STAMP)

$(DOCS_STAMP): pyproject.toml
	$(call install,docs)
	@touch $@

# The oldest versions, each with its newest bug fixes.
$(VENV)/.ready-oldest: CONSTRAINTS = $(VENV)/oldest.txt
$(VENV)/.ready-oldest: pyproject.toml tooling/oldest.py
	@mkdir -p $(VENV)
	$(if $(wildcard $(BIN)/python),,$(PYTHON) -m venv $(VENV))
	$(BIN)/python tooling/oldest.py $(subst $(comma), ,$(USER_EXTRAS)) > $(CONSTRAINTS)
	$(call install,$(USER_EXTRAS))
	@touch $@
