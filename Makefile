# Every target sets up what it needs. Nothing is written outside this folder but package caches and temporary files.
# STACK=newest uses today's torch, in an environment of its own, instead of the reference stack.
SHELL := /bin/sh
STACK ?= reference
VENV.reference := .venv
VENV.newest := .venv-newest
CONSTRAINTS.reference := constraints.txt
CONSTRAINTS.newest := constraints-newest.txt
VENV := $(or $(VENV.$(STACK)),$(error STACK=$(STACK) is unknown: use reference or newest))
PYTHON_IN := $(VENV)/bin/python
READY := $(VENV)/.ready
HOME_OF_TOOLS := $(CURDIR)/$(VENV)/var

export IPYTHONDIR := $(HOME_OF_TOOLS)/ipython
export JUPYTER_CONFIG_DIR := $(HOME_OF_TOOLS)/jupyter
export JUPYTER_DATA_DIR := $(HOME_OF_TOOLS)/jupyter-data
export JUPYTER_RUNTIME_DIR := $(HOME_OF_TOOLS)/jupyter-runtime
export MPLCONFIGDIR := $(HOME_OF_TOOLS)/matplotlib
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.PHONY: run test lab bench store doctor clean help

help:
	@echo "make run     run all notebooks; executed copies and a report go to results/"
	@echo "make test    lint, unit tests, and every notebook twice"
	@echo "make lab     open the notebooks in JupyterLab"
	@echo "make doctor  what can run here at full strength"
	@echo "make bench   the speed claims, measured here"
	@echo "make store   run the notebooks at their defaults and keep the outputs in them"
	@echo "make clean   remove what these made"
	@echo "Each with STACK=newest: on today's torch instead of the reference stack"

$(READY): pyproject.toml $(CONSTRAINTS.$(STACK)) setup.sh
	@./setup.sh $(STACK) $(VENV) $(CONSTRAINTS.$(STACK))

run: $(READY)
	@$(PYTHON_IN) -m companion run

test: $(READY)
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m ruff format --check .
	$(PYTHON_IN) -m pytest tests
	@rm -rf results/nbval && mkdir -p results/nbval && cp notebooks/*.ipynb results/nbval/
	$(PYTHON_IN) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=900 results/nbval

lab: $(READY)
	@$(PYTHON_IN) -m jupyterlab --ip=127.0.0.1 --notebook-dir=notebooks

bench: $(READY)
	@$(PYTHON_IN) -m benchmarks

store: $(READY)
	@$(PYTHON_IN) -m companion store

doctor: $(READY)
	@$(PYTHON_IN) -m companion doctor

clean:
	rm -rf .venv .venv-newest results notebooks/results notebooks/data build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
