# What people type:
#   make demo    from nothing to a trained model on two ranks: no compiler, a few minutes
#   make test    everything: lint, types, unit tests, tests on real ranks
# Variables:
#   PYTHON3      the Python (3.11 or newer) that makes .venv
#   PIP_ARGS     more arguments for every `pip install`. Where the package index's torch is a
#                CUDA build and this machine has no GPU, name PyTorch's CPU index here:
#                    make demo PIP_ARGS='--extra-index-url <index of CPU wheels>'
#   PYTEST_ARGS  more arguments for pytest, for example '-k adam -x'
#   SIZES, COMM  ranks and communicators of test-parallel
#
# All paths are relative and programs run as `python -m`, so that the path of this folder may
# hold spaces (a script in .venv/bin may not bear them).

PYTHON3 ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
SIZES ?= 1,2,3
COMM ?= mpi,horovod

# The versions that the tests are made for; the package itself allows ranges (setup.cfg).
TORCH := torch==2.13.0
TENSORFLOW := tensorflow-cpu==2.21.*

# A `-k` may select nothing in one of several runs of pytest, which is its exit code 5.
OR_NOTHING = $(if $(strip $(PYTEST_ARGS)),|| test $$? -eq 5)

PYTHON := .venv/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check install -q $(PIP_ARGS)
HPC_DL := $(PYTHON) -m hpc_dl.cli
RECIPE := setup.cfg pyproject.toml Makefile

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint test-unit test-parallel coverage docs bench-allreduce bench-adapter bench-between-nodes bench-compress bench-throttled bench-convergence \
        venv horovod doctor clean distclean

help:
	@echo 'make demo             train on two ranks, from nothing, without a compiler'
	@echo 'make test             lint + test-unit + test-parallel'
	@echo 'make lint             ruff and mypy'
	@echo 'make test-unit        tests in one process (PYTEST_ARGS)'
	@echo 'make test-parallel    tests on real ranks (SIZES, COMM, PYTEST_ARGS)'
	@echo 'make coverage         which lines of the package the unit tests run'
	@echo 'make docs             run the examples in the docstrings'
	@echo 'make bench-allreduce  one table: all-reduce against Horovod, mpi4py and gloo'
	@echo 'make bench-between-nodes  all-reduce between hosts on shaped links (root)'
	@echo 'make bench-compress   GB/s of the compression kernels against a copy'
	@echo 'make bench-throttled  step time on hosts with slow links, compressed and not (root)'
	@echo 'make bench-convergence  accuracy with compression against the dense control'
	@echo 'make bench-adapter    images/s through hpc_dl.torch against horovod.torch'
	@echo 'make horovod          build Horovod, unless a wheel that fits is cached'
	@echo 'make doctor           what is installed, what works, what to repair'
	@echo 'make clean            delete caches; distclean: .venv too'

# --- the environment ---------------------------------------------------------------------------

.venv/stamp-python:
	@"$(PYTHON3)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'Python 3.11 or newer is needed: make PYTHON3=/path/to/python3.11 ...' \
	         '(apt: python3.11, dnf: python3.11, or a module of your site)' >&2; exit 1; }
	@"$(PYTHON3)" -m venv .venv || { \
	    echo 'This Python makes no virtual environments: apt: python3-venv, dnf: python3-pip;' \
	         'or name another with PYTHON3=' >&2; exit 1; }
	@touch $@

.venv/stamp-demo: .venv/stamp-python $(RECIPE)
	$(PIP) '$(TORCH)' -e '.[mpi,jobs]'
	@touch $@

.venv/stamp-all: .venv/stamp-python $(RECIPE)
	$(PIP) '$(TORCH)' '$(TENSORFLOW)' -e '.[all]'
	@touch $@ .venv/stamp-demo

.venv/stamp-coverage: .venv/stamp-all
	$(PIP) '$(TORCH)' '$(TENSORFLOW)' -e '.[all,coverage]'
	@touch $@

venv: .venv/stamp-all

horovod: .venv/stamp-all
	$(HPC_DL) horovod build

# --- what people run ---------------------------------------------------------------------------

demo: .venv/stamp-demo
	$(HPC_DL) launch -n 2 jobs/digits.py

doctor: .venv/stamp-demo
	$(HPC_DL) doctor

test: lint test-unit test-parallel

lint: .venv/stamp-all
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test-unit: horovod
	$(PYTHON) -m pytest --doctest-modules hpc_dl tests/unit $(PYTEST_ARGS) $(OR_NOTHING)

test-parallel: horovod
	$(PYTHON) -m pytest tests --ignore=tests/unit --ignore=tests/parallel --ignore=tests/cluster \
	    $(PYTEST_ARGS) $(OR_NOTHING)
	$(PYTHON) tests/run_parallel.py --sizes '$(SIZES)' --comm '$(COMM)' $(PYTEST_ARGS) $(OR_NOTHING)

coverage: horovod .venv/stamp-coverage
	$(PYTHON) -m coverage erase
	$(PYTHON) -m coverage run -m pytest tests/unit $(PYTEST_ARGS)
	$(PYTHON) -m coverage combine -q
	$(PYTHON) -m coverage report

docs: horovod
	$(PYTHON) -m pytest --doctest-modules hpc_dl

bench-allreduce: horovod
	$(PYTHON) benchmarks/allreduce.py

bench-between-nodes: .venv/stamp-all
	$(PYTHON) benchmarks/between_nodes.py

bench-compress: .venv/stamp-all
	$(PYTHON) benchmarks/compress.py
	$(PYTHON) benchmarks/compress.py --wire

bench-throttled: horovod
	$(PYTHON) benchmarks/throttled.py --picture docs/pictures/throttled.png

bench-convergence: .venv/stamp-all
	$(PYTHON) benchmarks/convergence.py --picture docs/pictures/convergence.png

bench-adapter: horovod
	$(PYTHON) benchmarks/adapter.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf .venv
