# Every target makes what it needs, the environment included. `make` lists them.
#
#   TORCH=torch==2.13.0+cu130 make demo    another build of PyTorch
#   PYTHON=python3.12 make test            another interpreter for a new environment

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first Python on the path that is new enough.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
TORCH ?= torch==2.13.0
VENV ?= .venv
EDGE_VENV ?= .venv-edge
PIP_INSTALL = python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-edge lint format docs bench bench-full clean

help: ## List the targets.
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.installed ## Compress the built-in model, export it for four targets and compare what it paints.
	@rm -rf demo
	$(VENV)/bin/hptool compress --output demo/student
	$(VENV)/bin/hptool export demo/student --target cpu-x86 --target rtx3060-12gb --target rtx4090 --target rtx5090 \
		--output demo/bundle
	TRANSFORMERS_VERBOSITY=error $(VENV)/bin/python -m benchmarks.demo

test: $(VENV)/.installed ## Run every test, then check the edge in an environment without PyTorch.
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest --quiet -rs --numprocesses auto --dist loadfile --no-loadscope-reorder
	@$(MAKE) --no-print-directory test-edge

test-edge: $(EDGE_VENV)/.installed ## Check that a device needs the `edge` extra alone; paints with the bundle of `make demo`, if any.
	$(EDGE_VENV)/bin/python tests/edge.py $(wildcard demo/bundle)

lint: $(VENV)/.installed ## Check style, types and the arrows between packages.
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

format: $(VENV)/.installed ## Format, and mend what can be mended.
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

docs: $(VENV)/.installed ## Build the documentation as a site in build/site; a broken link fails.
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

bench: $(VENV)/.installed ## Measure what half an hour allows, and write the tables in docs/ anew; goes on where it stopped.
	$(VENV)/bin/python -m benchmarks quick

bench-full: $(VENV)/.installed ## The same with all there is, which takes some five hours on two cores and 60 GB of disk.
	$(VENV)/bin/python -m benchmarks full

clean: ## Remove the environments, the caches and what the demo wrote.
	rm -rf $(VENV) $(EDGE_VENV) build demo dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call new_venv,DIR): an environment in DIR, unless there is one.
define new_venv
@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found. Name one: make PYTHON=/path/to/python3"; exit 1; }
@test -x $(1)/bin/python || { echo "Making $(1) with $(PYTHON)"; $(PYTHON) -m venv $(1); }
endef

# PyTorch comes first and by itself, so that the build chosen here is the one that everything else finds.
$(VENV)/.installed: pyproject.toml
	$(call new_venv,$(VENV))
	@echo "Installing $(TORCH)"
	@$(VENV)/bin/$(PIP_INSTALL) '$(TORCH)'
	@echo "Installing hptool[all,dev,docs]"
	@$(VENV)/bin/$(PIP_INSTALL) --editable '.[all,dev,docs]'
	@touch $@

$(EDGE_VENV)/.installed: pyproject.toml
	$(call new_venv,$(EDGE_VENV))
	@echo "Installing hptool[edge]"
	@$(EDGE_VENV)/bin/$(PIP_INSTALL) --editable '.[edge]'
	@touch $@
