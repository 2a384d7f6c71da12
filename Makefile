# `make demo` and `make test` do all the set-up themselves; PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# run once more without transformers, which is an extra
CORE_TESTS := tests/ops --ignore=tests/ops/test_ladder.py tests/models/test_timm_files.py tests/backbone/test_backbone.py \
	tests/backbone/test_bad_input.py tests/backbone/test_checkpoint.py tests/images/test_image_modes.py \
	tests/images/test_image_processing.py

# what `make test-floor` runs, with the oldest versions that pyproject.toml declares
FLOOR := .venv-floor/bin
# a file and its folder in one call would be collected as the file alone by some versions of pytest
FLOOR_TESTS := $(filter-out tests/models/%,$(CORE_TESTS)) tests/harness tests/models tests/engine \
	tests/inspect

# some tests of every room, which take two minutes on two cores
QUICK_TESTS := $(addprefix tests/,test_layering.py test_places.py cli/test_cli.py weights images \
	backbone/test_backbone.py backbone/test_checkpoint.py backbone/test_configuration.py \
	models/test_parts.py models/test_swin.py models/test_resnet_on_triton.py \
	engine/test_choices.py engine/test_frozen.py engine/test_trial.py engine/test_ways.py \
	hosts/test_heads.py hosts/test_register.py inspect/test_doctor.py inspect/test_facts.py \
	extraction/test_decode.py extraction/test_sources.py extraction/test_store.py \
	ops/test_layer_norm_nchw.py ops/test_layer_norm_linear.py ops/test_window_attention.py \
	harness/test_interpret.py harness/test_canaries.py harness/test_self_check.py)

.PHONY: demo test test-quick test-all test-floor check docs dist bench gpu budgets clean

demo: .venv/.demo
	$(BIN)/python scripts/demo.py

# tests of signals send them to their own process, and have one of their own
SIGNAL_TESTS = tests/extraction/test_interruption.py

test: check
	$(BIN)/python -m pytest -n 2 -q --ignore $(SIGNAL_TESTS)
	$(BIN)/python -m pytest -q $(SIGNAL_TESTS)
	PYTHONPATH=tests/support $(BIN)/python -m pytest -n 2 -q -p block_transformers $(CORE_TESTS)

test-quick: .venv/.dev
	$(BIN)/python -m pytest -n 2 -q $(QUICK_TESTS)

# every kernel for every GPU, which `make test` compiles for two only; for ops that changed
test-all: test
	$(BIN)/python -m pytest -n 2 -q tests/ops/test_ladder.py -k keep_their_budget --all-architectures

test-floor: .venv-floor/.tests
	$(FLOOR)/python -m pytest -n 2 -q $(FLOOR_TESTS)
	$(FLOOR)/python -m fastbb_kernels.check --arch 90
	@echo "all well with the versions in constraints-floor.txt"

check: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# the pages of docs/ as a site; a broken link or an undocumented name is an error
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean

# a wheel and the sources, for `pip install dist/*.whl`
dist: .venv/.dev
	$(BIN)/python -m hatchling build

# the tables of docs/benchmarks and of the README, on this CPU; an hour
bench: .venv/.bench
	$(BIN)/python -m pytest bench --benchmark-only -q
	$(BIN)/python scripts/benchmark_pages.py --measure

# RUN=1: right, and how fast; RUN=2: launch configurations; RUN=3: NVIDIA's tools and the rest.
# Each takes the Python, torch and triton that the machine has, installs nothing; under eight minutes
RUN ?= 1
gpu:
	PYTHONPATH=.:kernels:bench $(PYTHON) bench/gpu.py --run $(RUN)

# what each kernel costs on each GPU, measured without one; review the diff it leaves
budgets: .venv/.dev
	$(BIN)/python -m fastbb_kernels.check --write-budgets

clean:
	rm -rf .venv .venv-floor demo-output dist site

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv-floor/bin/python:
	$(PYTHON) -m venv .venv-floor

.venv-floor/.tests: .venv-floor/bin/python pyproject.toml constraints-floor.txt
	$(FLOOR)/python -m pip install --quiet --disable-pip-version-check -c constraints-floor.txt \
		-e '.[transformers,testing]' torchvision pytest pytest-xdist
	touch $@

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	touch $@ .venv/.demo

.venv/.bench: .venv/.dev
	$(PIP) -e '.[dev,bench]'
	touch $@
