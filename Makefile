# `make` lists the targets. Everything is installed into .venv, or into the active virtual environment.
# TORCH= selects another torch (2.11 or later), PYTHON= the interpreter that creates .venv.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PY := "$(VENV)/bin/python"
JOBS ?= 2
export PATH := $(VENV)/bin:$(PATH)
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MAX_JOBS ?= $(JOBS)
# With this variable every process compiles what it imports: 0.4 s of each start of a training, 7 s of collecting tests.
unexport PYTHONDONTWRITEBYTECODE

# Two stamps record what is done: torch in the environment, named after the requested torch, and the installation of
# this checkout, named after the environment. Spaces in the checkout's path are escaped in file names that make reads,
# and quoted in recipes.
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
VENV_PYTHON := $(subst $(SPACE),\$(SPACE),$(VENV))/bin/python
TORCH_STAMP := $(subst $(SPACE),\$(SPACE),$(VENV))/.neox-$(subst /,-,$(TORCH))
INSTALLED := build/.installed$(subst $(SPACE),_,$(subst /,-,$(VENV)))
PIP = $(PY) -m pip install -q -c constraints.txt --no-build-isolation
REQUIREMENTS = import sys; from setuptools.config.pyprojecttoml import read_configuration as read; \
    project = read('pyproject.toml')['project']; print(*project['dependencies'], *(x for extra in sys.argv[1:] for x in project['optional-dependencies'][extra]))
NATIVE := $(shell find csrc -type f -not -name '*.pyc')
C_SOURCES := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test native-test emulated-test oldest-torch parallel-test harness-test fault-test mutation-test cuda-check ptx-check ptx-test sweep fuzz gpu-bundle gpu-rehearsal docs wheel bench lint static-checks style types format clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 22

setup: $(INSTALLED)  ## virtual environment, pinned packages, native extensions

$(VENV_PYTHON):
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error[14] Python is too old; where=PYTHON; got=%d.%d; want=3.10 or later" % sys.version_info[:2])'
	$(PYTHON) -m venv "$(VENV)"

# torch comes first: the extensions are built against the installed torch, without build isolation.
$(TORCH_STAMP): | $(VENV_PYTHON)
	$(PIP) pip setuptools wheel pybind11 ninja packaging
	$(PIP) "$(TORCH)"
	touch "$@"

# pip downloads and unpacks on one core, so the compiler runs at the same time.
$(INSTALLED): $(TORCH_STAMP) constraints.txt pyproject.toml setup.py $(NATIVE)
	@mkdir -p $(@D)
	$(PY) setup.py -q build_ext --inplace > build/compile.log 2>&1 & build=$$!; \
	    $(PIP) $$($(PY) -c "$(REQUIREMENTS)" test) || { kill $$build; exit 1; }; \
	    wait $$build || { cat build/compile.log; exit 1; }
	$(PIP) --no-deps -e .
	case "$(VENV)" in *" "*) sed -i '1s|^#!.* .*/python$$|#!/usr/bin/env python|' "$(VENV)"/bin/{deepspeed,ds}*;; esac  # pip does not quote spaces in a shebang
	touch "$@"

demo: setup  ## train, stop, resume, evaluate, generate and export a small model on real text
	$(PY) demo/demo.py

# No core idles: pyright, which uses one, runs next to the compiler; one call of ninja compiles the CUDA library too; the checks of the PTX run next to
# the C++ tests; and two processes more than there are cores run the tests, of which many wait for other processes. The tests that `lint` runs are among them.
test: setup  ## lint and the test suite, except fuzzing, sweeps and the matrix of layouts
	$(MAKE) --no-print-directory -j 2 static-checks native-test CUDA_LIBRARY=cuda_library MACHINE_CODE=OFF ALL_VARIANTS=OFF
	$(MAKE) --no-print-directory oldest-torch emulated-test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $$(($(JOBS) + 2)) --dist worksteal -m "not fuzz and not parallel and not faults and not harness and not sweep"

build/native/CMakeCache.txt: | $(INSTALLED)
	cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython3_EXECUTABLE=$(PY)

# The headers for oldest-torch are downloaded while the compiler runs.
native-test: setup build/native/CMakeCache.txt  ## C++ tests, also under sanitizers; emulated CUDA kernels with race and byte checks
	cmake -D NEOX_MACHINE_CODE=$(MACHINE_CODE) -D NEOX_ALL_VARIANTS=$(ALL_VARIANTS) build/native > /dev/null
	$(PY) tests/cuda/torch_headers.py build/oldest-torch > /dev/null 2>&1 & cmake --build build/native --parallel $(JOBS) --target $(CUDA_LIBRARY) all; wait
	ctest --test-dir build/native --output-on-failure --parallel $(JOBS) $(if $(CUDA_LIBRARY),,--exclude-regex 'nvcc|emu.bytes')
	$(if $(CUDA_LIBRARY),,build/native/tests/emu/test_ops_check --bytes)

emulated-test: setup build/native/CMakeCache.txt  ## the operators' tests on the emulated CUDA kernels
	cmake --build build/native --parallel $(JOBS) --target neox_emulated
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "not fuzz and not sweep" tests/ops --choices cuda --ops-library build/native/tests/emu/neox_emulated.so

oldest-torch: setup build/native/CMakeCache.txt  ## compile every binding against the headers of the oldest supported torch, if pip's index has its wheel
	@code=0; $(PY) tests/cuda/torch_headers.py build/oldest-torch || code=$$?; \
	    if [ $$code = 0 ]; then cmake --build build/native --parallel $(JOBS) --target oldest_torch; \
	        $(PY) tests/cuda/stable_symbols.py build/oldest-torch/include neox/_ops/*.so; elif [ $$code != 3 ]; then exit $$code; fi

MACHINE_CODE := ON
ALL_VARIANTS := ON
# nvdisasm counts the instructions of the hot loops.
NVDISASM = if command -v nvcc > /dev/null && ! command -v nvdisasm > /dev/null; then $(PIP) nvidia-cuda-nvdisasm || true; fi
cuda-check: setup build/native/CMakeCache.txt  ## compile, link and load the CUDA library, if nvcc is available; report registers and spills
	$(NVDISASM)
	cmake -D NEOX_MACHINE_CODE=$(MACHINE_CODE) build/native > /dev/null
	cmake --build build/native --parallel $(JOBS) --target cuda_check

ptx-check: setup build/native/CMakeCache.txt  ## run the operators' tests on nvcc's PTX, on the CPU, if nvcc is available
	cmake --build build/native --parallel $(JOBS) --target ptx_check

ptx-test: setup build/native/CMakeCache.txt  ## every kernel's PTX with the race checker, bit for bit against the emulated kernels, and planted faults
	cmake --build build/native --parallel $(JOBS) --target ptx_test

parallel-test: setup  ## compare every layout of up to four processes with one process, and print a table; hosts, restarts, other layouts after a resume
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -m parallel

fault-test: setup  ## hundreds of kills, signals, full disks, dead and stuck processes, and damaged checkpoints
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadgroup tests/faults tests/cli/test_verify_resume.py

harness-test: setup  ## compare with lm-evaluation-harness's hf model on the full LAMBADA and BLiMP sets; about 15 minutes
	$(PY) -m pytest tests/evaluate/test_full_sets.py -m harness -s

N ?= 20
SEED ?= 1
mutation-test: setup  ## change N random spots of MODULE=neox/... or csrc/..., one at a time, and print those that its tests do not notice
	@test -n "$(MODULE)" || { echo "error[2] no module; where=MODULE; want=a file of neox/ or csrc/; do=make mutation-test MODULE=neox/train/progress.py"; exit 2; }
	$(PY) -m tests.mutation.run $(MODULE) --number $(N) --seed $(SEED)

# The sanitizer runtimes must be loaded before python, whose interpreter is built without them.
SANITIZED = ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)"
EMULATED := build/native/tests/emu/neox_emulated

sweep: setup build/native/CMakeCache.txt  ## every attention mask x head_dim x length on CPU and emulated CUDA kernels; every set-up of an engine on a fake GPU
	cmake --build build/native --parallel $(JOBS) --target neox_emulated
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal -m sweep tests/ops tests/cuda
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal -m sweep tests/ops --ops-library $(EMULATED).so

# FUZZ= is the number of cases, or the seconds, of each fuzzer of the dataset core.
FUZZ ?= 60s
DATA_FUZZERS = test_index_damage_asan test_json_line_asan test_line_encoder_asan test_sample_index_asan
fuzz: setup build/native/CMakeCache.txt  ## random sweeps of the dataset core (FUZZ=600s for longer) and of the operators, also under sanitizers
	cmake --build build/native --parallel $(JOBS) --target $(DATA_FUZZERS)
	set -e; for fuzzer in $(DATA_FUZZERS); do build/native/tests/cpp/$$fuzzer $(FUZZ); done
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m fuzz
	cmake --build build/native --parallel $(JOBS) --target neox_emulated neox_emulated_asan
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m fuzz tests/ops --ops-library $(EMULATED).so
	OMP_NUM_THREADS=1 $(SANITIZED) $(PY) -m pytest -n $(JOBS) -m fuzz tests/ops --ops-library $(EMULATED)_asan.so

# GPU_PYTHON has the version of the GPU machine's Python; only its headers are used.
GPU_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12) python3.12)
gpu-bundle: setup build/native/CMakeCache.txt  ## what benchmarks/gpu.sh needs on a GPU machine without a network: libraries for sm_90a, wheels
	@$(PY) benchmarks/gpu/bundle.py tools --python "$(GPU_PYTHON)"
	cmake build/native > /dev/null  # an nvcc that was installed since
	cmake --build build/native --parallel $(JOBS) --target gpu_library
	$(PY) benchmarks/gpu/bundle.py make --python "$(GPU_PYTHON)"
	if [ -e build/oldest-torch/version ]; then $(PY) tests/cuda/stable_symbols.py build/oldest-torch/include build/gpu-bundle/neox/_ops/*.so; fi

gpu-rehearsal: setup  ## both calls of benchmarks/gpu.sh to their ends on the CPU; about four minutes
	code=0; for call in a b; do \
	    STRETCH=5 PYTHON=$(PY) DEVICE=cpu OUT=build/gpu-rehearsal/$$call benchmarks/gpu.sh $$call || code=$$?; done; exit $$code

docs: export NO_MKDOCS_2_WARNING := 1
docs: setup  ## build the documentation site into site/, with strict links and the API reference
	$(PIP) $$($(PY) -c "$(REQUIREMENTS)" docs)
	$(PY) -m mkdocs build --strict

wheel: setup  ## build a wheel into dist/, against the torch of the environment
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w dist .

bench: setup  ## every benchmark in its quick setting
	for script in $$(find benchmarks -name 'bench_*.py' | sort); do $(PY) "$$script" --quick; done

lint: static-checks  ## ruff, pyright, clang-format, the glossary, and the rule against pickle, eval, shells and the like
	$(PY) -m pytest -q tests/test_layout.py tests/test_language.py -k "forbidden or pickles or glossary"

static-checks: types style

style: setup
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(C_SOURCES)

types: setup  ## pyright in basic mode, which lint runs too
	$(PY) -m pyright --pythonpath $(PY)

format: setup  ## rewrite the sources with ruff and clang-format
	ruff check --fix .
	ruff format .
	clang-format -i $(C_SOURCES)

clean:  ## remove build products; .venv and runs remain
	rm -rf build dist site *.egg-info neox/_ops neox/_data*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
