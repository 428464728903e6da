# The two commands, `make train` and `make test`, and their sisters. The first call makes the virtual
# environment and builds the extension; later calls start at once, or rebuild what changed.
#   PYTHON=python3.12  the Python (>= 3.10) that makes the environment
#   VENV=folder        the environment; an existing one keeps the torch (>= 2.9) that it has
#   TORCH=torch==...   the torch that a new environment gets
#   HOPE_CUDA=0        build the CPU kernels only
#   HOPE_LINEINFO=1    keep source lines in the CUDA kernels, for profilers
#   ARGS=...           passed on to hope train, pytest or the benchmark
PYTHON ?= python3
VENV ?= .venv
export HOPE_CUDA ?=
export HOPE_LINEINFO ?=
export TORCH
MAKEFLAGS += --no-print-directory
.SILENT:

python := $(VENV)/bin/python
# --no-compile: Python compiles what is imported when it is, a small part of all that is installed.
pip := $(python) -m pip install --disable-pip-version-check --no-compile
dependencies := $(VENV)/.hope-dependencies
built := build/.built
native := $(wildcard csrc/*.cpp csrc/*/*)
settings := $(VENV) $(HOPE_CUDA) $(HOPE_LINEINFO) $(TORCH_CUDA_ARCH_LIST) $(CXX) $(native)
formatted := $(filter %.h %.cpp %.cu %.cuh,$(native) $(wildcard tests/emulator/*))
fail = { echo "hope_ext: $(1)" >&2; exit 1; }
index = $(call fail,pip failed; its reason is above. Is the package index reachable?)

help:
	echo 'make train    train the tiny language model on this machine (ARGS="--help" for options)'
	echo 'make test     checks of style and architecture, and all tests'
	echo 'make bench    time the operators'
	echo 'make profile  show where the time of an operator goes'
	echo 'make mutate   break the CUDA kernels line by line, and list what no test notices'
	echo 'make gpu      on a machine with a GPU: build for it, verify and time everything there'
	echo 'make lint     ruff and clang-format; make format mends what they can'
	echo 'make clean    remove what was built, and keep the environment'

train: $(built)
	$(VENV)/bin/hope train $(ARGS)

test: lint $(built)
	$(python) tests/side_by_side.py $(ARGS)

bench: $(built)
	$(python) -m benchmarks.ops --op titans $(ARGS)

profile: $(built)
	$(python) -m benchmarks.ops --op titans --profile $(ARGS)

# Long: ARGS="FILE... --minutes 30". Not part of CI.
mutate: $(built)
	PYTHONPATH=.:tests $(python) tests/emulator/mutate.py $(ARGS)

# Offline, with what is installed: it makes no environment, and says what is missing.
gpu:
	$(or $(wildcard $(python)),$(PYTHON)) -m benchmarks.gpu $(ARGS)

lint: $(dependencies)
	$(python) -m ruff check .
	$(python) -m ruff format --check --quiet .
	$(VENV)/bin/clang-format --dry-run -Werror $(formatted)

format: $(dependencies)
	$(python) -m ruff check --fix .
	$(python) -m ruff format .
	$(VENV)/bin/clang-format -i $(formatted)

clean:
	rm -rf build dist *.egg-info hope_ext/_C.*.so hope_ext/build_report.json .pytest_cache .ruff_cache

$(dependencies): pyproject.toml
	command -v $(PYTHON) >/dev/null || $(call fail,no Python: $(PYTHON) is not on PATH; name one by PYTHON=)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || $(call fail,Python >= 3.10 is needed: this is $$($(PYTHON) --version 2>&1); name another by PYTHON=)
	$(PYTHON) build_config.py check
	$(python) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	echo 'hope_ext: installing the dependencies into $(VENV); torch alone takes minutes'
	$(python) -c 'import torch' 2>/dev/null \
	    || $(pip) "$${TORCH:-$$($(python) build_config.py requirements torch)}" || $(index)
	$(python) build_config.py requirements build test dev >$@.txt
	$(pip) -q -r $@.txt || $(index)
	touch $@

$(built): $(dependencies) $(native) build_config.py build_report.py setup.py build/.settings
	echo 'hope_ext: building the extension, which takes a few minutes the first time'
	$(python) build_config.py requirements nvcc >build/nvcc.txt
	test ! -s build/nvcc.txt || $(pip) -q -r build/nvcc.txt || $(index)
	PYTHONWARNINGS=ignore $(pip) -q --no-build-isolation -e . || $(call fail,the build failed; its reason is above)
	touch $@

build/.settings: FORCE
	mkdir -p build && echo '$(settings)' | cmp -s - $@ || echo '$(settings)' >$@

FORCE:
.PHONY: help train test bench profile mutate gpu lint format clean FORCE
