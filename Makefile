# Two commands for a fresh clone, `make demo` and `make test`: each makes .venv from PYTHON first, with the exact versions
# of constraints.txt, and installs nothing when that has been done. `make help` lists the rest.

PYTHON ?= python3
OUT ?= runs/tradeoff
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt $(PIP_ARGS)
METADATA := pyproject.toml constraints.txt src/moesaic/_version.py

# The checkout's kernels/ must never be found as Hugging Face's package of that name.
export PYTHONSAFEPATH := 1
# Threads that wait for work must not spin where tests of another process could run.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint types unit test-huggingface train-lm architectures format clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/.bench ## sweep dense against sparse on this machine, into OUT; run again, it reuses the finished runs
	$(BIN)/moesaic sweep tradeoff --out $(OUT) --resume

# Types are checked while the tests run: one core waits often enough.
test: lint $(VENV)/.dev ## everything that must be green: lint, types, unit
	@$(BIN)/mypy > $(VENV)/types.log 2>&1 & types=$$!; \
	$(MAKE) --no-print-directory unit; unit=$$?; \
	wait $$types; types=$$?; cat $(VENV)/types.log; exit $$((unit | types))

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev ## mypy --strict on the four packages, the examples and the tests
	$(BIN)/mypy

unit: $(VENV)/.dev ## pytest, more than 90 % of the lines of kernels, moe and metrics covered
	$(BIN)/pytest --cov --cov-fail-under=90 --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-huggingface: $(VENV)/.huggingface ## what needs transformers, its neighbour `kernels`, or Ray, installed for it (about 300 MB)
	$(BIN)/pytest tests/test_packaging.py tests/moe/test_hf.py tests/moe/test_hf_routers.py tests/bench/test_bench_layer.py \
	  tests/moe/test_hf_gate.py tests/moe/test_hf_models.py tests/moe/test_hf_architectures.py tests/test_examples.py \
	  tests/metrics/test_flops_transformers.py tests/bench/test_engine_ray.py \
	  -k "huggingface or test_hf or transformers or test_examples or test_engine_ray" -rs --numprocesses 2 --dist loadfile

train-lm: $(VENV)/.huggingface ## the examples: a language model trained through the layer, then its experts measured
	$(BIN)/python examples/train_lm.py
	$(BIN)/python examples/superposition_of_a_real_moe.py

architectures: $(VENV)/.huggingface ## every architecture of transformers' experts interface against eager, into docs/transformers.md
	$(BIN)/python -m moesaic.bench.architectures --out docs/transformers.md

format: $(VENV)/.dev ## let ruff fix and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove .venv, caches, builds and the demo's runs
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage runs/tradeoff
	find . -name __pycache__ -prune -exec rm -rf {} +

# setuptools comes first and pinned, because an isolated build would fetch its newest.
$(VENV)/.bench: $(VENV)/.created $(METADATA)
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[bench]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created $(METADATA)
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[bench,dev]'
	@touch $(VENV)/.bench $@

$(VENV)/.huggingface: $(VENV)/.dev
	$(PIP) --no-build-isolation -e '.[transformers,ray]' kernels
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'moesaic needs Python 3.11 or newer, and $(PYTHON) is: '"$$($(PYTHON) -V 2>&1)"; \
	  echo 'Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11'; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo '$(PYTHON) cannot make virtual environments; on Debian and Ubuntu, install the package python3-venv.'; exit 1; } >&2
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
