# `make test` works on a machine with python3 (3.11 or later), make and git:
# it creates $(VENV) and installs what it needs there.

PYTHON ?= python3
VENV ?= .venv
# For instance TORCH_INDEX=https://download.pytorch.org/whl/cpu, where the default
# index has only the CUDA build of torch (several gigabytes).
TORCH_INDEX ?=
# For instance PYTEST_ARGS="-m 'not slow'".
PYTEST_ARGS ?=
# Test files run side by side, in as many processes.
JOBS ?= 2

BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-stamp
SETUP_CONVERT := $(VENV)/.setup-convert-stamp

.PHONY: setup setup-convert quickstart quickstart-align test test-torch lint \
  benchmarks clean
.DELETE_ON_ERROR:

# The stamps are newer than pyproject.toml as long as it has not changed.
setup: $(SETUP)

$(SETUP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: no '$(PYTHON)' here: install Python 3.11 or later" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), but lrm_jax needs Python 3.11" \
	    "or later: pass one as 'make PYTHON=python3.12 ...'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot create virtual environments (no ensurepip):" \
	    "on Debian or Ubuntu, run 'apt-get install python3-venv'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[quickstart,dev]'
	@touch $@

# torch alone and first: the extra's `torch>=...` is then satisfied by the CPU build.
setup-convert: $(SETUP_CONVERT)

$(SETUP_CONVERT): $(SETUP)
	$(BIN)/python -m pip install --quiet 'torch==2.13.0' \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --editable '.[convert]'
	@touch $@

# Under 1 M parameters on real handwritten digits; CPU only, minutes. The reward model
# from random initialisation is the baseline that the pretrained one must beat, the one
# on frozen blocks shares them with the generator. Then the trained model is evaluated
# as any other, from its folder. Last, it steers the generator.
quickstart: setup
	$(BIN)/python train/generator.py --config configs/quickstart_generator.py
	$(BIN)/python train/reward.py --config configs/quickstart.py
	$(BIN)/python train/reward.py --config configs/quickstart.py:random
	$(BIN)/python train/reward.py --config configs/quickstart.py:frozen
	$(BIN)/python train/compare_runs.py runs/quickstart/reward \
	  runs/quickstart/reward_frozen runs/quickstart/reward_random \
	  --out runs/quickstart/comparison.png
	$(BIN)/python train/evaluate.py --model runs/quickstart/reward/model \
	  --data digits=latents:runs/quickstart/pairs/held_out \
	  --prompt-cache runs/quickstart/pairs/prompts --noise independent \
	  --sigmas 0,0.1,0.25,0.4,0.5,0.75,0.9 --ensemble 0,0.1,0.25 --calibrate \
	  --out runs/quickstart/evaluation --force
	$(BIN)/python train/sample.py --config configs/quickstart.py

# Aligns that generator with that reward model, by four methods.
quickstart-align: setup
	$(BIN)/python train/compare_align.py --config configs/quickstart_align.py

# Every test, the slow ones included. Those that need torch skip without it.
test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  $(PYTEST_ARGS)

test-torch: setup-convert test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Narrow models beside PyTorch on one CPU core, a quarter of an hour; the GPU's commands
# are in benchmarks/README.md.
TABLES := scoring training explore grpo text_and_pixels compile_time

benchmarks: setup-convert
	for table in $(TABLES); do \
	  JAX_PLATFORMS=cpu taskset -c 0 $(BIN)/python benchmarks/$$table.py \
	    --out benchmarks/results/$${table}_cpu.json || exit 1; \
	done

# Leaves runs/ (results) alone.
clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
