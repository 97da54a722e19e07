# make run    set up .venv, then the quick start: FedLoRA, FedAvg and Local on bundled real data
# make test   set up .venv, then the tests to run before every commit: 8 to 15 minutes on 2 cores (JOBS=4 uses 4 cores)
# make docs   set up .venv, then build the site: build/docs/index.html
# make lint   set up .venv, then ruff (format and rules) and mypy
# Each works in a fresh clone; later calls reuse .venv.
# make test-all runs the rest of what CI runs. CONTRIBUTING.md explains make coverage and make mutants.
# The tests of Hugging Face networks are skipped until you run: .venv/bin/pip install -e '.[hf]' peft
# make test-slow runs the tests that take minutes; those on a real Slurm need: apt-get install slurm-wlm munge libpmix-dev

SHELL := /bin/bash
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Without these settings Open MPI refuses to run as root or with more ranks than cores. Other MPI libraries ignore them.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export HWLOC_HIDE_ERRORS := 1
JOBS ?= 2
STAMP := $(shell date +%Y%m%d-%H%M%S)
QUICK = mpirun -n 3 --bind-to none fedlora-mpi run configs/quickstart.yaml output=runs/quickstart-$(STAMP)/{algorithm}

.PHONY: install lint run test test-all test-slow coverage mutants docs
install: .venv/installed

.venv/installed: setup.py constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	touch $@

run: install
	@$(QUICK)
	@$(QUICK) algorithm=fedavg
	@$(QUICK) algorithm=local
	@fedlora-mpi report runs/quickstart-$(STAMP)/*
	@printf '%s\n' '' 'Next:' \
	  '  .venv/bin/fedlora-mpi partition configs/quickstart.yaml   # who has which data' \
	  '  .venv/bin/fedlora-mpi plan configs/cifar10.yaml           # what the paper'"'"'s run would cost here' \
	  '  .venv/bin/fedlora-mpi run configs/quickstart.yaml algorithm.lora_epochs=3 output=runs/mine'

PYTEST = .venv/bin/python -m pytest
SIDE_BY_SIDE = -n $(JOBS) --dist worksteal

test: install
	@$(PYTEST) $(SIDE_BY_SIDE)

test-all: install
	@$(PYTEST) $(SIDE_BY_SIDE) -m "thorough and not slow" --durations=10

test-slow: install
	@$(PYTEST) -m slow

lint: install
	@.venv/bin/ruff format --check --quiet . && .venv/bin/ruff check --quiet . && .venv/bin/mypy

coverage: install
	@.venv/bin/python -m coverage erase
	@$(PYTEST) $(SIDE_BY_SIDE) --cov --cov-report=
	@.venv/bin/python -m coverage report --format=total
	@$(PYTEST) $(SIDE_BY_SIDE) --cov --cov-append --cov-report=term:skip-covered -m "thorough and not slow"

mutants: install
	@.venv/bin/python tests/mutants/run.py $(ONLY)

docs: install
	@.venv/bin/python -m sphinx -W --keep-going -q -d build/doctrees docs build/docs
	@echo build/docs/index.html
