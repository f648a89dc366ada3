# make demo   sets up .venv, builds, runs three models side by side
# make test   sets up what is missing and runs the whole test suite
# make test-all   the tests on other Pythons as well
# make lint   formatting, lint, types
# make gpu-test PYTHON=python3   the GPU suite, with the torch of that interpreter

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.h)
# Extensions that benchmarks build at run time look for ninja on the path.
export PATH := $(abspath $(BIN)):$(PATH)
# CPU threads beyond the cores only make the models slower. (The demo runs with one thread for each
# model: importing silero_vad sets that for the process.)
export OMP_NUM_THREADS ?= $(shell nproc)

.PHONY: all build demo test test-all gpu-test lint format bench clean
all: build

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed (make PYTHON=...)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python scripts/install_dev.py
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(SOURCES)
	PYGPUKIT_STRICT=1 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# Every torch that we name: the CUDA sources are compiled against each.
TORCHES := 2.11.0 2.12.1 2.13.0 2.14.1
HEADERS := $(TORCHES:%=$(VENV)/torch-headers/%)
$(HEADERS): | $(VENV)/.installed
	$(BIN)/python scripts/torch_headers.py $(@D) $(@F)

build: $(VENV)/.built

demo: build
	$(BIN)/python examples/multi_model.py

test: build $(HEADERS)
	$(BIN)/python -m pytest

# The same, as far as no models are needed, on other Pythons.
PYTHONS ?= python3.12 python3.13
test-all: test
	for python in $(PYTHONS); do $(BIN)/python scripts/test_on.py $$python || exit 1; done

# On a machine with a GPU, for the interpreter and the torch in PYTHON: builds in place, no network.
GPU_REPORT ?= benchmarks/results/gpu-test.json
gpu-test:
	PYGPUKIT_STRICT=1 $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device")'
	$(PYTHON) -m pytest tests/gpu tests/unit/test_device_contract.py tests/unit/test_memory_pool.py \
		--report $(GPU_REPORT)

lint: build
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard benchmarks/*.cpp tests/*/*.cpp)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: build
	$(BIN)/clang-format -i $(SOURCES) $(wildcard benchmarks/*.cpp tests/*/*.cpp)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: build
	$(BIN)/python -m benchmarks all --quick

clean:
	rm -rf build *.egg-info pygpukit_torch/*.so pygpukit_torch/_build.py $(VENV)/.built
