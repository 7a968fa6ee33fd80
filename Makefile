# Everything here works on a fresh machine with Python 3.11 or newer, pip and a package index.
#
#   PYTHON=python3.12    another interpreter for the environments
#   PIP_FLAGS=...        more options for pip install (another index, a wheel folder)
#   PYTEST_FLAGS=...     more options for pytest:  make unit PYTEST_FLAGS="-k store -x"
#   DEMO_FLAGS=...       options of `culpa demo`
#   REPRODUCE_FLAGS=...  options of `culpa reproduce`, such as --data FOLDER
#   BENCH_FLAGS=...      options of benchmarks/gpu.py, such as --dtype bfloat16

SHELL := bash
PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
REPRODUCE_FLAGS ?=
BENCH_FLAGS ?=
WORKERS ?= 2

DEV := .venv
DEMO := .venv-demo
PEERS := .venv-peers
# The pin stands in one place only.
TORCH := $(shell grep '^torch==' constraints.txt)

# One thread a process: two pytest workers share two cores, and bitwise replay depends on it.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test docs bench bench-gpu bench-peers reproduce lint types contracts unit slow clean python-version

help:  ## what there is to make (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO)/.installed  ## record a small run, audit it and write the report
	$(DEMO)/bin/culpa demo $(DEMO_FLAGS)

# One after the other, cheapest first, so that a broken gate is the last thing on the screen.
test:  ## every gate: lint, types, contracts, unit
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory contracts
	@$(MAKE) --no-print-directory unit

lint: $(DEV)/.installed  ## ruff: rules and formatting
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .

types: $(DEV)/.installed  ## pyright, strict on the package
	$(DEV)/bin/pyright --pythonpath $(DEV)/bin/python

contracts: $(DEV)/.installed  ## import-linter: imports point one way
	$(DEV)/bin/lint-imports --no-logo

unit: $(DEV)/.installed  ## pytest, with the README's example
	$(DEV)/bin/python -m pytest -n $(WORKERS) -m 'not slow' $(PYTEST_FLAGS)

docs: $(DEV)/.installed  ## the documentation: docs/_build/html/index.html
	$(DEV)/bin/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo "Written: docs/_build/html/index.html"

# One process after the other, one thread each: ratios hold on a busy machine, but less well.
bench: $(DEV)/.installed  ## what everything costs, in trainings (an hour): benchmarks/results
	@echo "About an hour on a quiet machine: recording 15 minutes, attribute 10, ten stages 10, replay 5,"
	@echo "growth 10, fan-out 4, waiting updates 2, shards 7. Results are written as they come: benchmarks/results, docs/results/figures."
	$(DEV)/bin/python benchmarks/recording.py
	$(DEV)/bin/python benchmarks/attribute_costs.py
	$(DEV)/bin/python benchmarks/ten_stages.py
	$(DEV)/bin/python benchmarks/replay.py
	$(DEV)/bin/python benchmarks/growth.py
	$(DEV)/bin/python benchmarks/fanout.py
	$(DEV)/bin/python benchmarks/held.py --out benchmarks/results/held.json
	$(DEV)/bin/python benchmarks/in_shards.py --out benchmarks/results/in_shards.json
	$(DEV)/bin/python benchmarks/guard.py --write
	$(DEV)/bin/python benchmarks/performance.py

bench-peers: $(PEERS)/.installed  ## culpa beside bergson and dattri, in one run
	@echo "About ten minutes on a quiet machine."
	$(PEERS)/bin/python benchmarks/peers_bergson.py
	$(PEERS)/bin/python benchmarks/peers_dattri.py
	$(PEERS)/bin/python benchmarks/performance.py

bench-gpu: $(DEV)/.installed  ## adapters on 400 million parameters; a GPU, torch built for it
	$(DEV)/bin/python benchmarks/gpu.py --out benchmarks/results/gpu.json $(BENCH_FLAGS)

reproduce: $(DEV)/.installed  ## the paper's experiments at small scale, resumable: docs/results
	$(DEV)/bin/culpa reproduce all --out docs/results --drop-runs $(REPRODUCE_FLAGS)

slow: $(DEV)/.installed  ## the long ones: hundreds of kills, every fault in turn
	$(DEV)/bin/python -m pytest -m slow $(PYTEST_FLAGS)

clean:  ## remove environments, caches, build output, what demo and reproduce made
	rm -rf $(DEV) $(DEMO) $(PEERS) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf build dist culpa.egg-info culpa-demo culpa-reproduce docs/_build
	find culpa tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip names every package several times. What stays: large downloads, what was installed, warnings
# and every error. What goes is listed here, so that nothing unforeseen is hidden.
QUIETER := sed -e '/Location .* is ignored/d' -e '/^Looking in /d' -e '/^ *Collecting /d' \
	-e '/^ *Using cached /d' -e '/^ *Downloading .*metadata/d' -e '/^ *Downloading .* \(k\)*B)$$/d' \
	-e '/^Processing /d' -e '/^Requirement already /d' -e '/^ *Obtaining /d' \
	-e '/^ *Installing b[a-z]* dependencies/d' -e '/^ *Checking if build /d' \
	-e '/^ *Getting requirements /d' -e '/^ *Preparing /d' -e '/^ *Building /d' \
	-e '/^ *Created wheel /d' -e '/^ *Stored in /d' -e '/^Successfully built /d' \
	-e '/^Installing collected /d' -e '/^ *Attempting uninstall/d' \
	-e '/^ *Found existing /d' -e '/^ *Uninstalling /d' -e '/^ *Successfully uninstalled /d'

# $(1): environment, $(2): what to install. pipefail: the status is pip's, not sed's.
pip-install = set -o pipefail; $(1)/bin/python -m pip install --disable-pip-version-check \
	--progress-bar off -c constraints.txt $(PIP_FLAGS) $(2) 2>&1 | $(QUIETER)

# $(1): environment, $(2): extra. torch goes first and alone: it is most of the download, and
# pinned by name it cannot be pulled in as somebody's dependency in another build.
define install
	@echo "== $(1): Python environment with culpa[$(2)] (a few minutes the first time)"
	@$(PYTHON) -m venv $(1)
	@$(call pip-install,$(1),$(TORCH))
	@$(call pip-install,$(1),-e '.[$(2)]')
	@touch $@
endef

$(DEV)/.installed: pyproject.toml constraints.txt | python-version
	$(call install,$(DEV),dev)

$(DEMO)/.installed: pyproject.toml constraints.txt | python-version
	$(call install,$(DEMO),demo)

# Packages that culpa is compared with and never depends on.
$(PEERS)/.installed: $(wildcard benchmarks/peers/*) constraints.txt | python-version
	@echo "== $(PEERS): bergson, dattri and culpa (a few minutes the first time)"
	@PYTHON='$(PYTHON)' PIP_FLAGS='$(PIP_FLAGS)' benchmarks/peers/install.sh $(PEERS)
	@touch $@

python-version:
	@command -v $(PYTHON) > /dev/null || { \
		echo "culpa needs Python 3.11 or newer; there is no '$(PYTHON)' here. Name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "culpa needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
