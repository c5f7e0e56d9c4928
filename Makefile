# Everything runs in .venv, which the first target that needs it creates. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
FLOOR_VENV ?= .venv-floor
LATEST_VENV ?= .venv-latest
TORCH ?= torch==2.13.0
EXTRAS ?= dev
WORKERS ?= 2
DEMO_THREADS ?= 1
DEMO_CONFIG ?= examples/configs/grpo_mix_testbed.yaml

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := python -m pip install --disable-pip-version-check -q
PIP_INSTALL := $(BIN)/$(PIP)
CHECKED := trl_blend examples tests

# No test or example may reach for the network or print what it cannot change.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export TRL_EXPERIMENTAL_SILENCE ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo demo-offline test test-slow test-vllm test-floor test-latest lint format check fresh wheel-test export-test benchmarks gpu-check reproduce clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install the package in editable mode with every development tool

# torch goes first and by its exact version: the later range then finds it installed and pulls no other build.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@$(PIP_INSTALL) "$(TORCH)"
	@$(PIP_INSTALL) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: install  ## train a student with its teacher on two CPU cores and print a before/after table (about 3 minutes)
	$(BIN)/accelerate launch --config_file examples/accelerate_configs/cpu.yaml \
		--num_cpu_threads_per_process $(DEMO_THREADS) \
		examples/grpo_mix.py --config $(DEMO_CONFIG)

# Rollouts are kept, so that a second run starts at the training; `rm -r outputs/demo_offline` starts anew.
DEMO_OFFLINE := outputs/demo_offline
demo-offline: install  ## offline distillation in four stages on two CPU cores: before/after table (2 minutes)
	OMP_NUM_THREADS=$(DEMO_THREADS) $(BIN)/python examples/testbed/prompts.py --n 2560 \
		--output $(DEMO_OFFLINE)/prompts.jsonl
	OMP_NUM_THREADS=$(DEMO_THREADS) $(BIN)/trl-blend rollouts --dtype float32 --batch_size 64 \
		--model_name_or_path examples/testbed/checkpoints/sft_student --dataset_name $(DEMO_OFFLINE)/prompts.jsonl \
		--output_dir $(DEMO_OFFLINE)/rollouts --temperature 1 --top_p 1 --max_completion_length 48
	OMP_NUM_THREADS=$(DEMO_THREADS) $(BIN)/trl-blend score --dtype float32 --top_k 16 --tokens_per_batch 2048 \
		--teacher_model_name_or_path examples/testbed/checkpoints/teacher \
		--rollouts $(DEMO_OFFLINE)/rollouts --output_dir $(DEMO_OFFLINE)/scored
	OMP_NUM_THREADS=$(DEMO_THREADS) $(BIN)/trl-blend inspect $(DEMO_OFFLINE)/scored \
		--model_name_or_path examples/testbed/checkpoints/sft_student
	$(BIN)/accelerate launch --config_file examples/accelerate_configs/cpu.yaml \
		--num_cpu_threads_per_process $(DEMO_THREADS) \
		examples/offline_opd.py --config examples/configs/offline_opd_testbed.yaml

test: install  ## run the test suite without the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: install  ## run the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow

# The two ends of the ranges in pyproject.toml, each in an environment of its own, torch first. Where the index has no CPU
# build of these releases, torch brings gigabytes of CUDA libraries.
$(FLOOR_VENV)/.installed: pyproject.toml tests/lower_bounds.py
	@$(PYTHON) -m venv $(FLOOR_VENV)
	@$(PYTHON) tests/lower_bounds.py > $(FLOOR_VENV)/lower_bounds.txt
	@echo "installing the oldest releases into $(FLOOR_VENV)"
	@$(FLOOR_VENV)/bin/$(PIP) "$$(grep ^torch== $(FLOOR_VENV)/lower_bounds.txt)"
	@$(FLOOR_VENV)/bin/$(PIP) -c $(FLOOR_VENV)/lower_bounds.txt -e ".[test]"
	@touch $@

$(LATEST_VENV)/.installed: pyproject.toml
	@$(PYTHON) -m venv $(LATEST_VENV)
	@echo "installing the newest releases into $(LATEST_VENV)"
	@$(LATEST_VENV)/bin/$(PIP) --upgrade --upgrade-strategy eager -e ".[test]"
	@touch $@

test-floor: $(FLOOR_VENV)/.installed  ## run the test suite with the oldest releases that pyproject.toml allows
	OMP_NUM_THREADS=1 $(FLOOR_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

test-latest: $(LATEST_VENV)/.installed  ## run the test suite with the newest releases that pyproject.toml allows
	OMP_NUM_THREADS=1 $(LATEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

# An environment of its own: vLLM pins many packages that nothing else here needs.
$(VLLM_VENV)/.installed: tests/vllm/install_cpu.sh
	@echo "installing vLLM for CPU into $(VLLM_VENV) (3 GB)"
	@tests/vllm/install_cpu.sh $(VLLM_VENV) .
	@touch $@

test-vllm: $(VLLM_VENV)/.installed  ## run the tests that need a vLLM engine, on the CPU, in an environment of their own
	OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 \
		VLLM_NO_USAGE_STATS=1 $(VLLM_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m vllm tests/vllm

lint: install  ## ruff, its formatter, and mypy on the pure parts
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

format: install  ## fix what ruff can fix
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

check: lint test  ## lint, then test

fresh:  ## clone HEAD into a temporary folder and run `make test` and `make demo` there, in a new environment
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
		git clone -q . "$$folder/trl_blend" && cd "$$folder/trl_blend" && \
		$(MAKE) test VENV=.venv && $(MAKE) demo VENV=.venv

wheel-test: install  ## build the wheel, install it in a new environment outside the checkout, train, run its commands
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
		$(BIN)/python -m hatchling build -t wheel -d "$$folder" && \
		$(PYTHON) -m venv "$$folder/venv" && \
		"$$folder/venv/bin/python" -m pip install --disable-pip-version-check -q "$(TORCH)" && \
		"$$folder/venv/bin/python" -m pip install --disable-pip-version-check -q -c constraints.txt "$$folder"/*.whl && \
		cp tests/wheel_check.py "$$folder" && cd "$$folder" && \
		OMP_NUM_THREADS=1 "$$folder/venv/bin/python" -I wheel_check.py

export-test: install  ## decode an exported mixed policy in a new environment that has torch and transformers only
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
		$(PYTHON) -m venv "$$folder/venv" && \
		"$$folder/venv/bin/python" -m pip install --disable-pip-version-check -q "$(TORCH)" && \
		"$$folder/venv/bin/python" -m pip install --disable-pip-version-check -q -c constraints.txt transformers && \
		OMP_NUM_THREADS=1 $(BIN)/python tests/export/fresh_mixed_policy.py "$$folder/venv/bin/python"

benchmarks: install  ## measure cost against TRL (examples/benchmarks, ratios within one run)
	@for script in examples/benchmarks/[a-z]*.py; do echo "== $$script" && $(BIN)/python "$$script" || exit 1; done

gpu-check: install  ## engine and trainers at real shapes on one GPU (minutes): time per token, memory, tokens per second
	$(BIN)/python examples/benchmarks/gpu_check.py

reproduce: install  ## repeat the comparisons of the papers (examples/reproduce; hours)
	$(BIN)/python examples/reproduce/zero_reward.py --seeds 0 1 2 3 4
	$(BIN)/python examples/reproduce/zero_reward.py --task sorting --steps 100 --seeds 0 1 2 3 4
	$(BIN)/python examples/reproduce/importance_ratios.py
	$(BIN)/python examples/reproduce/weight_sweep.py
	$(BIN)/python examples/reproduce/logit_mixing.py
	$(BIN)/python examples/reproduce/trust_region.py
	$(BIN)/python examples/reproduce/off_task.py --seeds 0 1 2 3 4
	$(BIN)/python examples/reproduce/off_task.py --task sorting --seeds 0 1 2 3 4 --arms vanilla trust_0.2 contrastive sft
	$(BIN)/python examples/reproduce/offline_opd.py
	$(BIN)/python examples/reproduce/offline_horizon.py --seeds 0 1 2 3 4
	$(BIN)/python examples/reproduce/offline_horizon.py --task sorting --steps 40 --seeds 0 1 2 3 4 \
		--arms live_5e-05 paper_5e-05 ratio_5e-05 top_k_5e-05
	$(BIN)/python examples/reproduce/metric_ranges.py
	$(MAKE) $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python examples/reproduce/engines.py

clean:  ## remove the environment, caches and build results
	rm -rf $(VENV) $(VLLM_VENV) $(FLOOR_VENV) $(LATEST_VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find trl_blend examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
