PYTHON ?= python3
# What pip installs first; on a host with NVIDIA GPUs see README, "On GPUs".
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
S3 := .venv-s3
ROOMS := hone models training serving cluster
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install s3-server demo test lint format types imports test-unit test-integration test-matrix test-heavy k8s-check bench bench-methods bench-gpu bench-tables docs clean

help:  ## Print this
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## Make .venv and install hone into it, every version as constraints.txt pins it

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# torch first: a later step would take the newest build with all of CUDA.
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

s3-server: $(S3)/.installed  ## An S3 server to test against, apart from .venv: its libraries want older versions than constraints.txt pins

$(S3)/.installed:
	@# Without it the tests that need it are skipped, and say so.
	$(PYTHON) -m venv $(S3) && $(S3)/bin/python -m pip install --quiet 'moto[s3]==5.2.5' flask flask-cors && touch $@ \
		|| echo 'no S3 server could be installed'

demo: install  ## Fine-tune, search, publish and serve on this machine, in a few minutes
	$(BIN)/hone demo

test: install s3-server lint types imports test-unit test-integration  ## Everything CI runs

lint: install  ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## Rewrite files in our style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## mypy, strict
	$(BIN)/mypy

imports: install  ## Rooms import the floor, never each other
	$(BIN)/lint-imports

test-unit: install  ## Fast tests, no cluster
	$(BIN)/python -m pytest tests/unit tests/k8s tests/docs

test-integration: install  ## Real Ray, real workers, real HTTP
	$(BIN)/python -m pytest tests/integration --durations=12

k8s-check: install  ## Manifests and cluster launcher files against their schemas
	$(BIN)/python -m pytest tests/k8s

test-matrix: install  ## Every pair of task and method under ZeRO-0, 2 and 3 on two workers (about 8 minutes)
	HONE_TEST_MATRIX=all $(BIN)/python -m pytest tests/integration/test_zero_matrix.py --timeout 3000

test-heavy: install  ## Runs killed twenty times, nodes, hosts and heads that die and join, 64 workers, shared sequences, state on NVMe, 10,000 requests (about an hour)
	HONE_TEST_HEAVY=1 $(BIN)/python -m pytest tests/integration/test_kills.py tests/integration/test_nodes.py tests/integration/test_hosts.py \
		tests/integration/test_placement.py tests/integration/test_sequence_parallel.py tests/integration/test_head.py \
		tests/integration/test_clock.py tests/integration/test_nvme.py tests/integration/test_soak.py --timeout 3000

bench: install  ## Measure step time, new versions, cold adapters, the start, memory against the plan, accuracy, the engine and the server
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.new_version
	$(BIN)/python -m benchmarks.adapters
	$(BIN)/python -m benchmarks.start
	$(BIN)/python -m benchmarks.plan_memory
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.decode_plans
	$(BIN)/python -m benchmarks.arrivals
	$(BIN)/python -m benchmarks.ingress
	$(BIN)/python -m benchmarks.served_memory

bench-methods: install  ## Measure every method on one data set, forgetting with and without guards, and transfer
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.forgetting
	$(BIN)/python -m benchmarks.transfer

bench-gpu: install  ## On a GPU: tokens a second, utilisation and memory of LoRA and full fine-tuning at 1B and 8B, beside TRL
	$(BIN)/python -m benchmarks.gpu

bench-tables: install  ## Write the figures of benchmarks/results into README.md
	$(BIN)/python -m benchmarks.tables

docs: install  ## Write docs/cli.md, docs/recipe.md and docs/methods.md from the code
	$(BIN)/python -m docs.generate

clean:  ## Remove the virtual environment and caches (not .hone)
	rm -rf $(VENV) $(S3) .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
