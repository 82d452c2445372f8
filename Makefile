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

.PHONY: site preflight test-preflight test-lab test-colab links run test test-all test-units begin-test lint units notebooks-in-other-ways nbval lab bench store doctor clean help

help:
	@echo "make run     run all notebooks; executed copies and a report go to results/"
	@echo "make test    lint, unit tests, and every notebook in several ways; with NB=03, one notebook and its module"
	@echo "make test-units    lint and unit tests"
	@echo "make test-all STACK=newest    on the newest stack too, all that the reference stack is tested with"
	@echo "make test-lab    every notebook in JupyterLab, in a real browser (needs chromium or google-chrome)"
	@echo "make preflight    the environment in which a TPU's compiler runs without a TPU"
	@echo "make test-preflight    all that is asked of that compiler"
	@echo "make test-colab  every notebook in environments such as Colab's"
	@echo "make site    the lessons as web pages, in build/site"
	@echo "make lab     open the notebooks in JupyterLab"
	@echo "make doctor  what can run here at full strength"
	@echo "make bench   the speed claims, measured here"
	@echo "make store   run the notebooks at their defaults and keep the outputs in them"
	@echo "make links REPOSITORY=owner/name    write the project's address into all files"
	@echo "make clean   remove what these made"
	@echo "Each with STACK=newest: on today's torch instead of the reference stack"

# Google's TPU compiler: its jax must not meet torch_xla's.
PREFLIGHT := .venv-preflight/.ready

$(READY): pyproject.toml $(CONSTRAINTS.$(STACK)) setup.sh
	@./setup.sh $(STACK) $(VENV) $(CONSTRAINTS.$(STACK))

$(PREFLIGHT): pyproject.toml constraints.txt setup.sh
	@./setup.sh preflight .venv-preflight constraints.txt

# RUN_JOBS=2: two notebooks at once, where figures do not matter.
RUN_JOBS ?= 1
run: $(READY)
	@$(PYTHON_IN) -m companion run --jobs $(RUN_JOBS)

# The newest stack: what touches torch, and each notebook once with few repetitions. EVERYTHING=yes: as on the reference stack.
EVERYTHING ?= $(if $(filter reference,$(STACK)),yes)
SELECT := $(if $(EVERYTHING),,-m "not once")
# NB=03: one notebook and its module.
NB ?=
NAME := $(if $(NB),$(or $(basename $(notdir $(wildcard notebooks/$(NB)_*.ipynb))),$(error NB=$(NB) is no notebook)))
UNITS := $(if $(NB),$(wildcard tests/test_$(patsubst $(NB)_%,%,$(NAME)).py),tests --ignore tests/test_notebooks.py)
# Two at a time, a thread each; threads that wait do not spin, and XLA compiles fast instead of well.
JOBS ?= 2
# All that tests write besides goes to a folder of this checkout's own (a short name: Ray's sockets are in it), emptied at the start and after success.
TEST_FILES := $(or $(TMPDIR),/tmp)/test-$(shell pwd | cksum | cut -d' ' -f1)
QUIET := TMPDIR=$(TEST_FILES) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE XLA_FLAGS=--xla_backend_optimization_level=0
PYTEST := $(QUIET) $(PYTHON_IN) -m pytest -n $(JOBS)

test: $(READY) begin-test lint units notebooks-in-other-ways nbval
	@$(PYTHON_IN) -m tests.times
	@rm -rf $(TEST_FILES)

test-all: $(READY)
	@$(MAKE) --no-print-directory test EVERYTHING=yes

test-units: $(READY) begin-test lint units
	@$(PYTHON_IN) -m tests.times
	@rm -rf $(TEST_FILES)

begin-test: $(READY)
	@rm -rf $(TEST_FILES) && mkdir -p $(TEST_FILES)
	@$(PYTHON_IN) -m tests.times --start

lint: $(READY)
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m ruff format --check .

# The compiler is tested once, with the reference stack, where it runs.
units: $(READY) lint $(if $(filter Linux-x86_64-reference,$(shell uname -sm | tr ' ' -)-$(STACK)),$(PREFLIGHT))
	@mkdir -p $(TEST_FILES)
	$(if $(UNITS),$(PYTEST) --dist loadfile --no-loadscope-reorder $(SELECT) $(UNITS))

notebooks-in-other-ways: $(READY) units
	$(if $(EVERYTHING),$(PYTEST) --dist load tests/test_notebooks.py $(if $(NB),-k $(NAME)))

nbval: $(READY) notebooks-in-other-ways
	@$(PYTHON_IN) -m tests.nbval_copies $(if $(EVERYTHING),,--fewer) $(NB)
	$(PYTEST) --dist loadscope --no-loadscope-reorder -p tests.nbval_copies --nbval-lax --nbval-current-env --nbval-cell-timeout=900 results/nbval

# A reader's way: no limit to one thread.
test-lab: $(READY)
	COMPANION_LAB=all $(PYTHON_IN) -m pytest tests/test_lab.py

preflight: $(PREFLIGHT)

test-preflight: $(READY) $(PREFLIGHT)
	COMPANION_PREFLIGHT_ALL=yes $(PYTHON_IN) -m pytest tests/test_preflight.py

test-colab: $(READY)
	@$(PYTHON_IN) tests/colab.py

lab: $(READY)
	@$(PYTHON_IN) -m jupyterlab --ip=127.0.0.1 --notebook-dir=notebooks

bench: $(READY)
	@$(PYTHON_IN) -m benchmarks

store: $(READY)
	@$(PYTHON_IN) -m companion store $(NB)
	@$(PYTHON_IN) docs/figure.py

# REPOSITORY=owner/name: written wherever the project's address stands.
links: $(READY)
	@$(PYTHON_IN) -m companion links $(REPOSITORY)

site: $(READY)
	@$(PYTHON_IN) docs/build.py

doctor: $(READY)
	@$(PYTHON_IN) -m companion doctor

clean:
	rm -rf .venv .venv-newest .venv-preflight results notebooks/results notebooks/data build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
