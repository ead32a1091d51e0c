# make demo   set up and run the quickstart; ends by saying where the report is
# make test   set up, check style and types, run every test
# make rehearsal   run the published benchmarks on small simulated deposits, about a quarter of an hour
# make test-cluster   bring up a real Slurm on this machine (root, Debian) and run the demo's workflow through it
# make clean  remove the results of the demo
PYTHON ?= python3
VENV ?= .venv
CORES ?= 2
BIN := $(VENV)/bin

# PyPI's torch for Linux is the CUDA build of several GB: without an NVIDIA driver take the CPU wheel.
# TORCH=cpu or TORCH=cuda overrides; TORCH_INDEX names another place for CPU wheels.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_PIN := $(shell grep '^torch==' envs/constraints.txt)

.PHONY: demo test rehearsal test-cluster lint install install-test clean

demo: install
	$(BIN)/snakemake --cores $(CORES) --configfile config/config.yaml
	@echo "The report is at $(CURDIR)/results/report.html"

test: install-test $(VENV)/.executors
	$(MAKE) lint
	CELLFORMERS_PLUGINS=$(abspath $(VENV)/executors) $(BIN)/pytest -q -n $(CORES) --dist loadfile $(PYTEST_OPTIONS)

rehearsal: install-test
	CORES=$(CORES) $(BIN)/pytest -q tests/rehearsal $(PYTEST_OPTIONS)

test-cluster: install-test
	CORES=$(CORES) $(BIN)/pytest -q tests/cluster $(PYTEST_OPTIONS)

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/snakemake --lint --configfile config/config.yaml

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/.torch: envs/constraints.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	$(BIN)/pip install --quiet --retries 1 --no-deps --extra-index-url $(TORCH_INDEX) $(TORCH_PIN)
else
	$(BIN)/pip install --quiet $(TORCH_PIN)
endif
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --constraint envs/constraints.txt --editable ".[workflow]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint envs/constraints.txt --editable ".[workflow,test]"
	touch $@

$(VENV)/.executors: envs/executors.txt $(VENV)/.installed-test
	rm -rf $(VENV)/executors
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/executors --requirement envs/executors.txt
	touch $@

clean:
	rm -rf results .snakemake
