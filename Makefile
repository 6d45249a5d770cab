# `make help` lists the targets. Each makes the environment it needs; all it takes is Python 3.11 or newer.
.DEFAULT_GOAL := help
PYTHON ?= python3
MINUTES ?= 20
CORES ?=
SERVE := .venv-serve
DEV := .venv
LOWEST := .venv-lowest
LOWEST_PYTHON ?= $(or $(shell command -v python3.11),$(PYTHON))
LOWEST_TESTS := tests/unit/api tests/unit/front tests/unit/package tests/unit/serving/test_repository.py \
  tests/unit/test_settings.py tests/integration/test_predict.py tests/integration/test_bad_input.py \
  tests/integration/test_security.py tests/integration/test_fast_path.py tests/integration/test_fast_path_alone.py
ENGINES ?= $(or $(VERNIER_ENGINES_DIR),engines)
GPU_PACKAGES ?= build/gpu
# the checkout's own package, without installing it
export PYTHONPATH := $(CURDIR)/app$(if $(PYTHONPATH),:$(PYTHONPATH))
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: help serve engines test test-slow test-containers test-lowest check format bench bench-scheduler bench-peers bench-precision gpu-test gpu-bench pin-images soak lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

$(SERVE)/ready: requirements/build.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Vernier needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python $(PIP) --require-hashes -r requirements/build.txt
	@touch $@

$(DEV)/ready: requirements/dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Vernier needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python $(PIP) --require-hashes -r requirements/dev.txt
	@touch $@

$(LOWEST)/ready: requirements/lowest.txt
	$(LOWEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the lowest versions have wheels for Python 3.11 alone: make LOWEST_PYTHON=/path/to/python3.11 …")'
	$(LOWEST_PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python $(PIP) --require-hashes --only-binary=:all: -r requirements/lowest.txt
	@touch $@

engines: $(SERVE)/ready $(ENGINES)/ranker/1/manifest.json $(ENGINES)/keywords/1/manifest.json ## build the two example packages

$(ENGINES)/ranker/1/manifest.json:
	$(SERVE)/bin/python examples/build.py ranker --out $(ENGINES)

$(ENGINES)/keywords/1/manifest.json:
	$(SERVE)/bin/python examples/build.py keywords --out $(ENGINES)

serve: engines ## build the example packages if need be, and serve them; takes every VERNIER_… variable, PORT and ENGINES
	$(if $(PORT),VERNIER_PORT=$(PORT)) $(if $(filter-out engines,$(ENGINES)),VERNIER_ENGINES_DIR=$(ENGINES)) \
	  $(SERVE)/bin/python -m vernier

test: $(DEV)/ready ## all tests that need neither a GPU nor containers
	$(DEV)/bin/python -m pytest -q -m "not gpu and not slow and not containers"

test-containers: $(DEV)/ready ## build the images and run compose for real, with a Docker engine of its own (Debian, as root)
	scripts/docker_stand_ins.sh $(DEV)/bin/python -m pytest -q -m containers tests/containers

test-lowest: $(LOWEST)/ready ## the service with the lowest versions that pyproject.toml allows (needs Python 3.11)
	$(LOWEST)/bin/python -m pytest -q $(LOWEST_TESTS)

check: $(DEV)/ready ## formatting, lint, types, layers
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

format: $(DEV)/ready ## format and mend what can be mended by itself
	$(DEV)/bin/ruff format .
	$(DEV)/bin/ruff check --fix .

bench: $(DEV)/ready engines ## requests per second and latency on this machine
	$(DEV)/bin/python -m benchmarks.serving --engines $(ENGINES)

bench-peers: $(DEV)/ready ## the service beside MOSEC, FastAPI … → benchmarks/PEERS.md; CORES=8: on 1 to 8 cores → SCALING.md (wants wrk)
	$(DEV)/bin/python -m benchmarks.peers $(if $(CORES),--cores $(CORES))

bench-precision: $(DEV)/ready ## accuracy of every architecture → benchmarks/PRECISION.md (needs torch: see there)
	$(DEV)/bin/python -m benchmarks.precision

bench-scheduler: $(DEV)/ready ## batching under load: throughput, Poisson, bursts, overload → benchmarks/SCHEDULER.md
	$(DEV)/bin/python -m benchmarks.scheduler

gpu-test: ## the tests that need TensorRT and a GPU, in the Python that has them (PY=…)
	$(or $(PY),$(PYTHON)) -m pytest -q -c tests/gpu/pytest.ini --rootdir=. tests/gpu tests/contract

gpu-bench: ## speed on a GPU → benchmarks/GPU.md
	test -d $(GPU_PACKAGES) || $(PYTHON) -m benchmarks.gpu.packages $(GPU_PACKAGES)
	$(or $(PY),$(PYTHON)) -m benchmarks.gpu --packages $(GPU_PACKAGES)

pin-images: ## pin the container images by digest (needs a registry)
	scripts/pin_images.sh

test-slow: $(DEV)/ready ## the tests that take minutes
	$(DEV)/bin/python -m pytest -q -m slow

soak: $(DEV)/ready engines ## MINUTES (20) at 80 % of capacity with reloads: leaks, errors, latency → benchmarks/SOAK.md
	$(DEV)/bin/python -m benchmarks.soak --minutes $(MINUTES) --engines $(ENGINES)

lock: $(DEV)/ready ## renew the lock files in requirements/ from pyproject.toml
	PYTHON=$(DEV)/bin/python scripts/lock.sh

clean: ## remove environments and caches; engines stay
	rm -rf $(SERVE) $(DEV) $(LOWEST) .mypy_cache .ruff_cache .pytest_cache .hypothesis
