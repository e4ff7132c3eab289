# `make up` and `make test` need nothing but Python 3.11 or newer: the first of them makes .venv.
PYTHON ?= python3
PY := .venv/bin/python
PROTOC := $(PY) -m grpc_tools.protoc -I protos
PACKAGES := protos gateway engine replay deploy tests
STARTED_AT := $(shell date +%s)
MODEL := SmolLM2-135M-Instruct

.DEFAULT_GOAL := help
.PHONY: help up demo test check bench proto install model clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

up: install  ## Serve a model on this machine: workers and the gateway, until Ctrl-C. More flags: ARGS="--workers 2"
	@$(PY) -m deploy up --started-at $(STARTED_AT) $(ARGS)

demo: install  ## The tour, unattended: serve, capture, replay at 10x, compare
	@$(PY) -m deploy demo $(ARGS)

test: install-dev check model  ## Static checks and all tests. One folder: ARGS=tests/replay
	@$(PY) -m pytest -q $(ARGS)

check: install-dev  ## Lint, types, import direction, generated code
	@$(PY) -m ruff check -q $(PACKAGES)
	@$(PY) -m ruff format -q --check $(PACKAGES)
	@$(PY) -m mypy --no-error-summary
	@.venv/bin/lint-imports --no-cache > .venv/lint-imports.log || (cat .venv/lint-imports.log; exit 1)
	@fresh=$$(mktemp -d) && $(PROTOC) --python_out=$$fresh --pyi_out=$$fresh protos/engine.proto && \
		for file in engine_pb2.py engine_pb2.pyi; do \
			cmp $$fresh/$$file protos/gen/$$file || { echo "protos/gen is stale: run make proto"; rm -r $$fresh; exit 1; }; \
		done; rm -r $$fresh
	@echo "check: ok"

bench: install-bench model  ## Compare the gateway with Envoy, vllm-router and vllm serve; scheduler, overload
	@$(PY) -m tests.bench $(ARGS)

proto: install-dev  ## Regenerate protos/gen from protos/engine.proto
	@$(PROTOC) --python_out=protos/gen --pyi_out=protos/gen protos/engine.proto

install:  ## Make .venv with what serving needs
	@$(PYTHON) deploy/install.py run

.PHONY: install-dev install-bench
install-dev:
	@$(PYTHON) deploy/install.py dev

install-bench:
	@$(PYTHON) deploy/install.py bench

model: install  ## Fetch the small default model into the cache
	@$(PY) -m deploy model pull $(MODEL)

clean:  ## Remove .venv, caches and logs; captures and reports stay
	rm -rf .venv .tidegate build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
