# make train   install into .venv, then run the main job (ARGS="--training.steps 100" overrides any key)
# make test    install into .venv, then run the tests
# make quick   the same for mathematics, one layout, protocol and configuration alone, in under two minutes
# All re-use .venv; it is brought up to date when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
CONFIG ?= configs/transformer_debug.toml
ARGS ?=
# Without a GPU, set this to PyTorch's package index for CPU builds and several GB are not fetched.
TORCH_INDEX_URL ?=

VENV := .venv
BIN := $(VENV)/bin
GPUS = $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
NPROC ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
# Without this torchrun warns and gives every rank one thread.
CORES = $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
OMP_NUM_THREADS ?= $(shell expr $(CORES) / $(NPROC) \| 1)

# With PYTHONSAFEPATH set, torchrun cannot import parallel/ and checkpoint/ beside train.py.
unexport PYTHONSAFEPATH

# Test files at a time. Each takes up to two gigabytes, and a test up to eight ranks.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile

.PHONY: train test quick test-all lint format bench clean
.DEFAULT_GOAL := test

# Settings are checked first, in a tenth of a second and not once per rank. exec: make passes SIGTERM on
# to what it has started, which would be a shell that does not.
train: $(VENV)/installed
	@exec env WORLD_SIZE=$(NPROC) $(BIN)/python -m titan_shampoo.config --job.config_file $(CONFIG) $(ARGS)
	exec env OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m parallel.launch --standalone \
		--nproc_per_node=$(NPROC) train.py --job.config_file $(CONFIG) $(ARGS)

# Limits of a test in seconds, some times the PATIENCE of tests/support/ranks.py: a machine may have other
# work.
test: $(VENV)/installed
	$(PYTEST) --timeout=1800 $(ARGS)

# Mathematics; the protocol of an optimizer, of each kind; configuration; and one layout, FSDP on two ranks.
QUICK = \
	tests/test_roots.py tests/test_symmetric.py tests/test_grid.py tests/test_eva_math.py tests/test_kfac_math.py \
	tests/test_shampoo_reference.py::test_stacks_of_experts_are_cut_slice_by_slice \
	tests/test_optimizer_protocol.py tests/test_eva_protocol.py \
	tests/test_config.py tests/test_options.py \
	tests/test_alignment.py

quick: $(VENV)/installed
	$(PYTEST) --timeout=1800 $(QUICK) $(ARGS)

# GPU tests take part where there is a GPU.
test-all: $(VENV)/installed
	$(PYTEST) --timeout=3600 -m "$(if $(filter-out 0,$(GPUS)),,not gpu)" $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff --version
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --version
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Other libraries' optimizers are timed beside ours; they are installed for this only.
bench: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python -m benchmarks.optimizer_step --threads $(CORES) --peers --steps 10
	$(BIN)/python -m benchmarks.training_step transformer --tokens 1024 --threads $(CORES) \
		--bases SGD AdamW --methods Eva EvaF EvaS FOOF KFAC Shampoo SOAP
	$(BIN)/python -m benchmarks.checkpoint_cost

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# torch is resolved together with everything else, so that pip cannot install it twice; build/ is removed
# because setuptools would package modules that are long deleted.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \
		'titan-shampoo needs Python 3.11 or newer; $(PYTHON) is ' + sys.version.split()[0] + '; set PYTHON=python3.11')"
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments; install its venv module (Debian: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	rm -rf build
	$(BIN)/python -m pip install --disable-pip-version-check \
		$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
		--constraint constraints.txt --editable ".[dev]"
	@touch $@
