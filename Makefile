# Every target creates what it needs in .venv, but for `gpu` and `opt-1.3b`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
# In the order of the names: files of few tests are the longest, and would come last.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo docs test lint format bench gpu opt-1.3b sass build clean

demo: $(DEMO_STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m experiments.finetune --methods zo fo-lora hybrid-lora --steps 100 --out runs/demo
	OMP_WAIT_POLICY=passive $(BIN)/python examples/generated_text.py

test: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PYTEST_ARGS)

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

clean:
	rm -rf $(VENV) build dist runs site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
