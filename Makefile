# Every target does everything, set-up included.

PYTHON ?= python3
BIN := .venv/bin
# Processes: one a GPU (a power of two of them, which divides the batch), or 4 on a CPU, which makes a 2 x 2 mesh.
NPROC ?= $(shell $(BIN)/python -c "import torch; print(1 << (torch.cuda.device_count() or 4).bit_length() - 1)")
# For pytest, as in: make check ARGS="--override model.rope_theta=500000"
ARGS ?=
# torchrun would set this too, with a warning; train.py gives each process its share of the cores.
export OMP_NUM_THREADS ?= 1
# Seconds from Ctrl-C or SIGTERM until torchrun kills its processes: a stop finishes the step and saves.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 300

.PHONY: train test test-exercises test-forks test-integrations check kill-test soak bench lint

train: .venv/run
	$(BIN)/torchrun --standalone --nproc_per_node=$(NPROC) train.py
	$(BIN)/python generate.py runs/quickstart --prompt "    def __init__(self" --temperature 0.7 --top-k 30 --seed 3

test: .venv/dev
	$(BIN)/python -m pytest tests $(ARGS)

# Each break of docs/exercises.md, caught by its law.
test-exercises: .venv/dev
	$(BIN)/python -m pytest -m exercise tests/test_exercises.py $(ARGS)

# The same training under Ray, Lightning and SLURM, and lm-evaluation-harness on what export.py wrote.
test-integrations: .venv/integrations
	$(BIN)/python -m pytest -m integration tests/test_integrations.py $(ARGS)

# The recipes of docs/forking.md: each diff on a copy, with its laws.
test-forks: .venv/dev
	$(BIN)/python -m pytest -m fork tests/test_forking.py $(ARGS)

# The laws on tiny runs, with your keys set: what to run after each change.
check: .venv/dev
	$(BIN)/python -m pytest -vv -rs tests/test_check.py $(ARGS)

# SIGKILL, a hundred times.
kill-test: .venv/dev
	$(BIN)/python -m pytest -s tests/test_kill.py --kills=100

# Half an hour of disturbances, then the same steps without.
soak: .venv/dev
	$(BIN)/python benchmarks/soak.py

# Next to what people would use instead: a table of ratios, in a quarter of an hour.
bench: .venv/dev
	$(BIN)/python benchmarks/bench.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/integrations: .venv/dev requirements-integrations.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-integrations.txt
	touch $@
