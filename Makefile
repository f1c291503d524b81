# Everything a newcomer needs: Python >= 3.10, a C++17 compiler and make. The rest comes from PyPI into .venv.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
FASTVIDEO ?= fastvideo==0.2.1
DEMO_OUT ?= demo_out
export EMBEDDER ?=
BENCH_OUT ?= bench_out
# Processes that share the test files, where pytest-xdist is there. Each computes with one thread.
JOBS ?= 2
# What pytest-benchmark measures after the suites.
BENCH_PYTEST ?= benchmarks/test_bank.py benchmarks/test_embedder.py benchmarks/test_micro.py
BENCH_RESULTS ?=
# Tools of compute-sanitizer, and the tests they run: each op once by the Triton engine.
SANITIZE ?= memcheck racecheck
SANITIZED ?= agree_with_the_oracle and triton and float16 and not bfloat16
# The same list as in pyproject.toml, [build-system]. The extension is built without isolation: an isolated build makes
# a new environment and compiles from nothing every time, this one reuses both, and CMake recompiles what has changed.
BUILD_TOOLS = 'setuptools>=77' 'cmake>=3.20' ninja 'pybind11>=2.13'
EXTRAS = demo,train,dev,bench

# What the extension module is built from: a change in one of these rebuilds it.
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
key = $(shell echo '$(1)' | cksum | cut -d ' ' -f 1)
PIP = $(RUN) -m pip --disable-pip-version-check
# Python compiles what it imports; compiling all of torch beforehand takes four times as long as unpacking it.
INSTALL = $(PIP) install -q --no-compile
# A program that prints the torch of an environment, as a line that pip takes for a constraint.
TORCH_VERSION = from importlib.metadata import version; print("torch==" + version("torch"))

# By its full name: PATH changes below.
BASE := $(or $(shell command -v '$(PYTHON)'),$(PYTHON))
ifeq ($(VENV),none)
RUN := $(BASE)
BIN := $(shell $(BASE) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
INSTALLED := build/installed-$(call key,$(PYTHON)).stamp
else
RUN := $(VENV)/bin/python
BIN := $(abspath $(VENV))/bin
# A stamp for each version of torch: another TORCH=... is installed when it is asked for.
TOOLS := $(VENV)/.tools-$(call key,$(TORCH) $(TRITON))
INSTALLED := $(VENV)/.installed-$(call key,$(TORCH) $(TRITON))
endif
# Packages of other projects have an environment of their own, and there the stamp says what it holds, not how old the
# files are: a new checkout keeps it.
BACKBONES_VENV := .venv-backbones
BACKBONES_REQUIREMENTS := tests/backbones/requirements.txt
ifeq ($(VENV),none)
BACKBONES_RUN := $(RUN)
BACKBONES_INSTALLED :=
else
BACKBONES_RUN := $(BACKBONES_VENV)/bin/python
BACKBONES_INSTALLED := $(BACKBONES_VENV)/.installed-$(shell (echo '$(TORCH) $(FASTVIDEO)'; cat $(BACKBONES_REQUIREMENTS)) | cksum | cut -d ' ' -f 1)
endif
# cmake and ninja of the environment come first, then those of the system.
export PATH := $(BIN):$(PATH)

.PHONY: help setup demo test test-cpp test-python setup-backbones test-backbones sanitize bench bench-gpu bench-check gpu-check lint wheel clean
.DEFAULT_GOAL := help

help:
	@echo 'make setup   install the package and its tools into $(VENV) (editable), compile the C++ core'
	@echo 'make demo    run the demo, results in $(DEMO_OUT)'
	@echo 'make test    C++ tests and Python tests'
	@echo 'make test-backbones   tests against published backbones (diffusers, FastVideo), in $(BACKBONES_VENV); not part of test'
	@echo 'make sanitize   the C++ tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer'
	@echo 'make bench   every suite of benchmarks on this CPU beside what one would use instead, results in $(BENCH_OUT)'
	@echo 'make bench-gpu   the same on a CUDA device, and the ops and the memory bank against set targets, results in $(BENCH_OUT)'
	@echo 'make bench-check   a short run on this CPU: fails where a recorded ratio has become more than 25 % worse'
	@echo 'make gpu-check   some GPU tests under compute-sanitizer (SANITIZE=memcheck racecheck initcheck synccheck)'
	@echo 'make lint    ruff and mypy'
	@echo 'make wheel   build a wheel into dist'
	@echo 'make clean   remove what was built ($(VENV) stays)'
	@echo
	@echo 'PYTHON=python3.12    the Python to use (>= 3.10)'
	@echo 'VENV=none            use PYTHON as it is: nothing is downloaded, only this package is installed into it'
	@echo "TORCH='torch==2.13.0'   what pip installs as torch; to this an --index-url may be added, for a smaller CPU build"
	@echo "TRITON='triton==3.7.1'  what pip installs where torch brings no Triton: tests run its kernels in the interpreter"
	@echo 'JOBS=1                  runs the Python tests in one process; by default two share them'
	@echo 'EMBEDDER=trained        what demo searches by: the package'\''s trained embedder, or a checkpoint file of your own'
	@echo 'BENCH_RESULTS=FOLDER    what bench-check compares with: by default the results of this device, or the newest of a CPU'
	@echo 'LONGLIVE_PEERS=FOLDER   where test-backbones finds checkouts of backbones that no package has'
	@echo 'LONGLIVE_BUILD_CUDA=auto|1|0   compile CUDA sources when nvcc is found | or fail | never'

setup: $(INSTALLED)
	@echo 'setup: ready, with $(RUN)'

ifeq ($(VENV),none)
$(INSTALLED): $(SOURCES)
	@echo 'setup: installing longlive-rag-ops into $(PYTHON) (editable, no downloads)'
	@$(INSTALL) --no-build-isolation --no-deps -e .
	@$(RUN) -c 'from longlive_rag_ops.build_info import summary; print("setup:", summary())'
	@mkdir -p $(@D) && touch $@
else
$(VENV)/.created:
	@$(BASE) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "setup: Python >= 3.10 is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another with PYTHON=...")'
	@echo 'setup: creating $(VENV) with $(PYTHON)'
	@$(BASE) -m venv $(VENV) || { echo 'setup: $(PYTHON) cannot create a virtual environment. On Debian and Ubuntu: apt install python3-venv.'; \
	  echo 'setup: Or use a Python that already has the dependencies: make ... PYTHON=... VENV=none'; exit 1; }
	@touch $@

$(TOOLS): $(VENV)/.created
	@echo 'setup: installing $(TORCH) and the build tools into $(VENV) (the first time this takes minutes)'
	@$(INSTALL) $(TORCH)
	@# A CUDA build of torch has brought the Triton it was made with; a CPU build has none.
	@$(RUN) -c 'import triton' 2>/dev/null || $(INSTALL) '$(TRITON)'
	@$(INSTALL) $(BUILD_TOOLS)
	@rm -f $(VENV)/.tools-* $(VENV)/.installed-* && touch $@

$(INSTALLED): $(TOOLS) $(SOURCES)
	@echo 'setup: compiling and installing longlive-rag-ops[$(EXTRAS)] into $(VENV) (editable)'
	@$(INSTALL) --no-build-isolation -e '.[$(EXTRAS)]'
	@$(RUN) -c 'from longlive_rag_ops.build_info import summary; print("setup:", summary())'
	@touch $@
endif

demo: $(INSTALLED)
	@echo 'demo: writing to $(DEMO_OUT)'
	@$(RUN) -m longlive_rag_ops demo --out $(DEMO_OUT) $(if $(EMBEDDER),--embedder "$$EMBEDDER")

test: test-cpp test-python

test-cpp: $(INSTALLED)
	@if command -v cmake >/dev/null && command -v ninja >/dev/null; then \
	  echo 'test: C++ tests' && \
	  cmake -S . -B build/ctest -G Ninja -DCMAKE_MAKE_PROGRAM="$$(command -v ninja)" -DLONGLIVE_PYTHON=OFF -DLONGLIVE_TESTS=ON >/dev/null && \
	  cmake --build build/ctest >build/ctest/log && \
	  (cd build/ctest && ctest --output-on-failure --no-tests=error) >>build/ctest/log 2>&1 && \
	  grep 'tests passed' build/ctest/log || { cat build/ctest/log; exit 1; }; \
	else echo 'test: C++ tests skipped, cmake and ninja are not on PATH'; fi

test-python: $(INSTALLED)
	@echo 'test: Python tests'
	@OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" $(RUN) -m pytest -q \
	  $$($(RUN) -c 'import xdist' 2>/dev/null && echo '-n $(JOBS) --dist loadfile --no-loadscope-reorder')

# make turns every status into 2. What wants to tell a failed installation from failed tests, as .ci/run does, makes
# setup-backbones first, which fails for no other reason. The constraint keeps pip from replacing torch.
setup-backbones: $(BACKBONES_INSTALLED)

ifneq ($(VENV),none)
$(BACKBONES_INSTALLED): | $(VENV)/.created
	@echo 'setup-backbones: installing $(TORCH), $(FASTVIDEO) and $(BACKBONES_REQUIREMENTS) into $(BACKBONES_VENV)'
	@mkdir -p build && rm -rf $(BACKBONES_VENV)
	@{ $(RUN) -m venv $(BACKBONES_VENV) && \
	  pip='$(BACKBONES_RUN) -m pip --disable-pip-version-check install -q --no-compile' && \
	  $$pip $(TORCH) && $(BACKBONES_RUN) -c '$(TORCH_VERSION)' >$(BACKBONES_VENV)/torch.txt && \
	  $$pip -c $(BACKBONES_VENV)/torch.txt -r $(BACKBONES_REQUIREMENTS) && \
	  $$pip --no-deps '$(FASTVIDEO)'; } >build/setup-backbones.log 2>&1 || \
	  { echo "setup-backbones: not installed, see build/setup-backbones.log: $$(grep -i error build/setup-backbones.log | tail -n 1)"; exit 75; }
	@touch $@
endif

# The compiled core is the one that setup has built in place, by the same Python.
test-backbones: $(INSTALLED) $(BACKBONES_INSTALLED)
	@$(if $(BACKBONES_INSTALLED),$(BACKBONES_RUN) -c '$(TORCH_VERSION)' | cmp - $(BACKBONES_VENV)/torch.txt || \
	  { echo 'test-backbones: something has replaced torch in $(BACKBONES_VENV); remove that folder'; exit 1; })
	@echo 'test-backbones: with $(BACKBONES_RUN)'
	@PYTHONPATH='$(CURDIR)' $(BACKBONES_RUN) -c 'from longlive_rag_ops.build_info import extension; extension()' || \
	  { echo 'test-backbones: the compiled core does not load in $(BACKBONES_RUN); was that made by another Python? remove its folder'; exit 1; }
	@PYTHONPATH='$(CURDIR)' $(BACKBONES_RUN) -m pytest -q tests/backbones

sanitize: $(INSTALLED)
	@command -v cmake >/dev/null && command -v ninja >/dev/null || { echo 'sanitize: cmake and ninja are not on PATH, nothing was checked'; exit 1; }
	@csrc/tests/sanitize.sh

# The suites first: a status of theirs does not keep pytest's from running.
bench: $(INSTALLED)
	@echo 'bench: writing to $(BENCH_OUT)'
	@mkdir -p $(BENCH_OUT)
	@status=0; $(RUN) -m longlive_rag_ops bench --preset cpu --out $(BENCH_OUT) || status=$$?; \
	  LONGLIVE_BENCH_OUT=$(BENCH_OUT) $(RUN) -m pytest -q -s $(BENCH_PYTEST) --benchmark-json=$(BENCH_OUT)/benchmarks.json || status=$$?; \
	  exit $$status

# BENCH_GPU=--dry-run runs all of it on a CPU with tiny sizes.
bench-gpu: $(INSTALLED)
	@echo 'bench-gpu: writing to $(BENCH_OUT)'
	@status=0; for part in gpu_ops gpu_bank; do \
	  LONGLIVE_BENCH_OUT=$(BENCH_OUT) $(RUN) -m benchmarks.$$part $(BENCH_GPU) || status=$$?; done; \
	  $(RUN) -m longlive_rag_ops bench --preset $(if $(filter --dry-run,$(BENCH_GPU)),tiny,gpu) --out $(BENCH_OUT) || status=$$?; \
	  exit $$status

bench-check: $(INSTALLED)
	@echo 'bench-check: a short run on this CPU against recorded ratios; the machine should have nothing else to do'
	@$(RUN) -m benchmarks.bench_check $(if $(BENCH_RESULTS),--results $(BENCH_RESULTS))

# One process for each tool; torch's caching allocator would hide reads and writes past the end of a tensor.
gpu-check: $(INSTALLED)
	@$(RUN) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu-check: torch finds no CUDA device here, nothing was checked")'
	@command -v compute-sanitizer >/dev/null || { echo 'gpu-check: compute-sanitizer is not on PATH (it comes with the CUDA toolkit), nothing was checked'; exit 1; }
	@failed=; for tool in $(SANITIZE); do \
	  echo "gpu-check: $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 $(RUN) -m pytest -q -m gpu \
	    -p no:cacheprovider tests/test_gpu.py -k '$(SANITIZED)' || failed="$$failed $$tool ($$?)"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 $(RUN) -m pytest -q -m gpu \
	    -p no:cacheprovider tests/bank || failed="$$failed $$tool of the bank ($$?)"; done; \
	  if [ -n "$$failed" ]; then echo "gpu-check: failed:$$failed; 9 is what compute-sanitizer found, others are the tests' own"; exit 1; \
	  else echo 'gpu-check: nothing found by $(SANITIZE)'; fi

lint: $(INSTALLED)
	@for tool in ruff mypy; do \
	  $(RUN) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$$tool') is None)" || \
	  { echo "lint: $$tool is not installed in $(RUN)"; exit 1; }; done
	@echo 'lint: ruff check' && $(RUN) -m ruff check .
	@echo 'lint: ruff format' && $(RUN) -m ruff format --check .
	@echo 'lint: mypy' && $(RUN) -m mypy

wheel: $(INSTALLED)
	@echo 'wheel: building into dist'
	@rm -rf build/lib.* build/bdist.*  # setuptools would pack what an older build left there
	@$(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	@ls -l dist/*.whl

clean:
	@echo 'clean: removing build products and caches ($(VENV) stays)'
	@rm -rf build dist wheelhouse *.egg-info longlive_rag_ops/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@rm -rf $(DEMO_OUT) $(BENCH_OUT) $(wildcard $(VENV)/.installed-*)
	@find longlive_rag_ops triton_kernels tests -name __pycache__ -prune -exec rm -rf {} +
