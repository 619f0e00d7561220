# Commands for people: `make demo` shows the method at work, `make test` runs every test, `make help` lists all.
# Each makes .venv and installs there what it needs (pinned in requirements/); nothing is installed elsewhere.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
CMAKE_BUILD := build/cmake
CLANG ?= clang++
CONFIGURE = $(BIN)/cmake -S . -B $(CMAKE_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python --log-level=WARNING
SOURCES := $(shell find csrc build_support -type f -not -name '*.pyc') setup.py pyproject.toml
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.inl')
# Compiling bytecode is left to the first import: most of what pip would compile is never used.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --no-compile

.PHONY: help demo test pytest ctest op fuzz bench bench-quick instructions instruction-baseline lint format tidy docs pins wheels \
  audit compile_commands clean
.DELETE_ON_ERROR:
.SECONDARY:

help:
	@echo "make demo          train with and without class-specific gates on real images; at most 6 minutes on 2 free cores"
	@echo "make test          run all tests: make pytest those of Python, make ctest those of C++"
	@echo "make op            build what changed, test and time one operator: OP=gated_pool (or gate_step, mutual_info)"
	@echo "make fuzz          new random inputs for operators, files and the CPU kernels: FUZZ_EXAMPLES=2000 a test, FUZZ_SECONDS=60"
	@echo "                   for each of 27 targets, one after the other; needs clang (CLANG=clang++-14)"
	@echo "make bench         measure operators and training steps beside peers, write docs/performance*.md"
	@echo "make bench-quick   a few sizes, less than 2 minutes; writes nothing"
	@echo "make instructions  count the CPU kernels' instructions (valgrind), fail where 5 % more than the committed baseline;"
	@echo "                   make instruction-baseline writes a new baseline"
	@echo "make lint          ruff, mypy, clang-format; make format rewrites the files"
	@echo "make tidy          clang-tidy over the CPU sources and the C++ tests; fails at any finding"
	@echo "make docs          build the documentation's site, build/docs/index.html; a warning is an error"
	@echo "make wheels        a manylinux wheel in dist/, checked; with the CUDA kernels: make wheels WHEEL_OPTIONS=--cuda"
	@echo "make audit         look the pinned packages up among the known vulnerabilities (asks PyPI)"
	@echo "make pins          pin the newest packages in requirements/ (asks the package index)"
	@echo "make compile_commands   build/cmake/compile_commands.json for editors and clang-tidy"
	@echo "make clean         remove what was built, and .venv"
	@echo "Options: PYTHON=python3.12 chooses the interpreter of .venv, CSG_EXT_CUDA=0 leaves the CUDA kernels out."

demo:
	@echo "csg-ext demo: installs PyTorch and this package in $(VENV), then trains a small ResNet on Fashion-MNIST twice,"
	@echo "without and with class-specific gates, and compares the two: at most 6 minutes on 2 free CPU cores."
	@$(MAKE) --silent --no-print-directory $(VENV)/.package-train
	@$(BIN)/csg-ext train --output $(DEMO) --overwrite

test: ctest pytest

pytest: $(VENV)/.package-dev $(VENV)/.zoo
	$(BIN)/python -m pytest

ctest: $(VENV)/.package-dev
	@$(CONFIGURE) -DCSG_EXTENSION=OFF
	@$(BIN)/cmake --build $(CMAKE_BUILD)
	$(BIN)/ctest --test-dir $(CMAKE_BUILD) --parallel 2 --output-on-failure

# One operator, in about a minute: what takes longer than all of it is left to the whole tests and benchmarks:
# torch.compile, the baseline instruction set, and peers that are never the fastest.
OP ?= gated_pool
op: $(VENV)/.requirements-dev
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m pytest -q --disable-warnings $(wildcard tests/test_$(OP).py tests/test_$(OP)_transforms.py) \
	  -k 'not compile and not opcheck and not baseline'
	CSG_BENCH_QUICK=1 $(BIN)/python -m pytest -q --disable-warnings benchmarks/bench_$(OP).py \
	  -k 'not compiled and not autotuned and not masked and not both and not scikit' \
	  --benchmark-only --benchmark-max-time=0.1 --benchmark-columns=median,iqr,rounds

FUZZ_EXAMPLES ?= 2000
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/.package-dev $(VENV)/.fuzz
	CSG_FUZZ=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q tests/test_fuzz.py tests/test_fuzz_mutual_info.py
	PYTHONPATH=$(VENV)/fuzz $(BIN)/python tests/fuzz_files.py --all -max_total_time=$(FUZZ_SECONDS)
	$(BIN)/cmake -S . -B build/cmake-fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja --log-level=WARNING \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_CXX_COMPILER=$(CLANG) -DCSG_FUZZ=ON
	$(BIN)/cmake --build build/cmake-fuzz
	build/cmake-fuzz/tests/fuzz_mutual_info -max_len=1024 -len_control=0 -max_total_time=$(FUZZ_SECONDS)

# A tenth of a second for each: pytest-benchmark's tables are for a look, the report is what compares.
BENCH := $(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-max-time=0.1

bench: $(VENV)/.package-dev
	$(BENCH)
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/report_mutual_info.py

bench-quick: $(VENV)/.package-dev
	CSG_BENCH_QUICK=1 $(BENCH)

instructions: $(VENV)/.requirements-dev
	@$(CONFIGURE) -DCSG_EXTENSION=OFF
	@$(BIN)/cmake --build $(CMAKE_BUILD) --target instruction_counts
	$(BIN)/python tools/instruction_counts.py $(COUNT_OPTIONS) $(CMAKE_BUILD)/tests/instruction_counts

instruction-baseline: COUNT_OPTIONS = --update
instruction-baseline: instructions

lint: $(VENV)/.requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@echo "$(BIN)/clang-format --dry-run -Werror (all of csrc and tests)"
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.requirements-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# From nothing every time, in seconds: a page that is gone leaves no trace, and a warning is never hidden by what is there.
docs: $(VENV)/.package-docs
	@rm -rf build/docs
	$(BIN)/python -m sphinx --builder html --fresh-env --fail-on-warning --keep-going --quiet --doctree-dir build/doctrees docs build/docs
	@echo build/docs/index.html

tidy: CMAKE_BUILD = build/cmake-tidy
tidy: $(VENV)/.requirements-dev
	@$(CONFIGURE) -DCSG_EXTENSION=ON
	@echo "$(BIN)/clang-tidy -p $(CMAKE_BUILD) --quiet (all of csrc/*.cpp and tests/cpp)"
	@find csrc tests/cpp -name '*.cpp' | xargs -P 2 -n 1 $(BIN)/clang-tidy -p $(CMAKE_BUILD) --quiet

pins: $(VENV)/.requirements-dev
	$(PIP) uv
	PATH=$(CURDIR)/$(BIN):$$PATH requirements/pin.sh

wheels: $(VENV)/.requirements-dev $(VENV)/.requirements-release
	$(BIN)/python tools/build_wheels.py dist $(WHEEL_OPTIONS)

# --strict: a package that cannot be looked up is a failure, not a pass.
audit: $(VENV)/.requirements-release
	for file in requirements/*.txt; do $(BIN)/pip-audit --strict --no-deps --disable-pip -r $$file || exit 1; done

compile_commands: $(VENV)/.requirements-dev
	@$(CONFIGURE) -DCSG_EXTENSION=ON
	@echo $(CMAKE_BUILD)/compile_commands.json

clean:
	rm -rf build dist *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f csg_ext/*.so csg_ext/.*.so.new
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- .venv: stamps say what is installed, so that nothing is installed twice.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python >= 3.10 is needed, got $$($(PYTHON) --version 2>&1): name one, as in make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is missing: install it (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.requirements-%: requirements/%.txt | $(VENV)/.made
	@echo "Installing requirements/$*.txt in $(VENV) ..."
	@$(PIP) -r $<
	@touch $@

$(VENV)/.zoo: requirements/zoo.txt | $(VENV)/.made
	@echo "Installing $< in $(VENV)/zoo, where only tests look ..."
	@rm -rf $(VENV)/zoo
	@$(PIP) --no-deps --target $(VENV)/zoo -r $<
	@touch $@

$(VENV)/.fuzz: requirements/fuzz.txt | $(VENV)/.made
	@echo "Installing $< in $(VENV)/fuzz ..."
	@rm -rf $(VENV)/fuzz
	@$(PIP) --no-deps --target $(VENV)/fuzz -r $<
	@touch $@

# One compile at a time, whichever set of packages is there: both stamps name the same editable install.
$(VENV)/.package-%: $(VENV)/.requirements-% $(SOURCES)
	@echo "Building csg-ext ..."
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@
