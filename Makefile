# Targets: env, kernels, quickstart, test, test-full, lint, clean. DSMOE_VENV chooses the environment's folder (default .venv).
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := $(or $(DSMOE_VENV),.venv)
PY := $(VENV)/bin/python
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
PYTHON_TAG := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
# Exact pins where there are any for this kind of machine; constraints/README.md says why not on GPUs.
CONSTRAINTS ?= $(if $(filter 0,$(GPUS)),$(wildcard constraints/cpu-$(PYTHON_TAG).txt))
# Compiling thousands of modules that are never imported is most of the time of an install.
PIP := $(PY) -m pip install --quiet --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
STAMP := $(VENV)/.dsmoe-$(shell cat setup.py $(CONSTRAINTS) | sha256sum | cut -c1-16)

CORES := $(shell nproc 2>/dev/null || echo 2)
# The quickstart: two ranks, on GPUs if there are two or more, one if there is one, and two on a CPU.
RANKS := $(if $(filter 1,$(GPUS)),1,2)
ON_CPU := $(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu)
# Seconds after which a test group is interrupted; pytest then still prints its summary.
UNIT_SECONDS ?= 480
DISTRIBUTED_SECONDS ?= 540
KERNEL_SECONDS ?= 420

# The compiled operations; KERNELS=--no-cuda leaves the GPU part out, which is most of the time.
KERNELS ?=

.PHONY: help env kernels quickstart test test-full lint clean

help:
	@echo "make env         make or renew the environment in $(VENV)"
	@echo "make kernels     build the compiled operations (CPU always, GPU where nvcc is): faster, same results"
	@echo "make quickstart  train the small default recipe on this machine, then say where everything lies"
	@echo "make test        all tests that this machine can run"
	@echo "make test-full   what takes too long for every change: invariance, layout changes, 100 kills, memory (hours)"
	@echo "make lint        style checks"
	@echo "make clean       remove caches and build products (not runs, not the environment)"

env: $(STAMP)

# torch comes first because DeepSpeed's source distribution imports it while it is built.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel ninja packaging
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed==0.19.8
	$(PIP) --no-build-isolation -e .[dev]
	@rm -f $(VENV)/.dsmoe-*
	@touch $@

kernels: env
	$(PY) kernels/build.py $(KERNELS)

quickstart: env
	$(ON_CPU) OMP_NUM_THREADS=$(shell echo $$(( $(CORES) / $(RANKS) > 0 ? $(CORES) / $(RANKS) : 1 ))) \
	PATH="$(abspath $(VENV))/bin:$$PATH" deepspeed --num_gpus $(RANKS) launchers/pretrain.py \
	    --deepspeed_config ds_configs/quickstart.json

# The files of the second group, so that the thousands of other tests are not collected again.
DISTRIBUTED_FILES = $(shell grep -rl "mark\.distributed" tests --include="test_*.py")
# Unit tests in two halves side by side, one thread each; what the first says is shown when the second has ended.
UNIT_HALF = $(addprefix tests/,base benchmarks models moe ops scaling)
# All groups run, also when one fails. --foreground lets Ctrl-C reach pytest.
PYTEST = timeout --foreground -s INT -k 30 $(1) $(PY) -m pytest -q $(2) </dev/null || status=$$?
test: env
	@$(PY) kernels/build.py --no-cuda --optional
	@mkdir -p build
	@status=0; export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}; \
	( $(call PYTEST,$(UNIT_SECONDS),-m "not distributed" $(UNIT_HALF)); exit $$status ) >build/unit_half.log 2>&1 & half=$$!; \
	$(call PYTEST,$(UNIT_SECONDS),-m "not distributed" --ignore=tests/kernels $(addprefix --ignore=,$(UNIT_HALF))); \
	wait $$half || status=$$?; cat build/unit_half.log; \
	$(call PYTEST,$(DISTRIBUTED_SECONDS),-m distributed $(DISTRIBUTED_FILES)); \
	$(call PYTEST,$(KERNEL_SECONDS),tests/kernels); \
	exit $$status

# What does not fit into `make test`. Each goes on where it was when started again; results lie in .test-full.
test-full: env
	$(PY) tests/full/invariance_table.py --write docs/invariance.md
	$(PY) tests/full/invariance_fp64.py --write docs/invariance.md
	$(PY) tests/full/bf16_statement.py --write docs/invariance.md
	$(PY) tests/full/expert_parallel.py --write docs/invariance.md
	$(PY) tests/full/expert_parallel_state.py --write docs/invariance.md
	$(PY) tests/full/expert_parallel_bf16.py --write docs/invariance.md
	$(PY) tests/full/layout_change.py --write docs/layout_change.md
	$(PY) tests/full/layout_change_experts.py --write docs/layout_change.md
	PYTHONPATH=. $(PY) benchmarks/memory.py --folder .test-full/memory --write docs/memory.md
	PYTHONPATH=. $(PY) benchmarks/kill_and_resume.py --folder .test-full/kills --kills 100 --write .test-full/kills.md

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf build dist dsmoe/ops/native/libdsmoe_kernels.so.1 *.egg-info .pytest_cache .ruff_cache
	find dsmoe tests launchers benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
