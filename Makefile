# What the targets are for: docs/commands.md. `make train` and `make test` set up .venv by themselves, once.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RECIPE ?= shapes
OUT ?= runs/$(RECIPE)-$(shell date +%Y%m%d-%H%M%S)
ARGS ?=
# Versions to install: .ci/newest.txt, .ci/oldest.txt, or nothing for what the index has today.
CONSTRAINTS ?= .ci/newest.txt
# Processes that share the files of tests.
JOBS ?= 2
INSTALL = $(BIN)/pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS))

.PHONY: train test test-oldest test-slow lock lint docs parity plan bench profile plot gpu learning compare ablations faults soak sanitize resources clean

train: $(VENV)/.installed
	@echo "== training recipe $(RECIPE) into $(OUT)"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/egrpo train $(RECIPE) output_dir=$(OUT) $(ARGS)

test: $(VENV)/.installed-dev
	@echo "== tests"
	EGRPO_CONSTRAINTS=$(CONSTRAINTS) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The same tests with the oldest versions that pyproject.toml allows, in an environment of their own.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=.ci/oldest.txt

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# After the tests passed with newer versions: the versions that are installed now become the tested ones.
lock: $(VENV)/.installed-dev
	sed -n '/^#/p' .ci/newest.txt > .ci/newest.tmp
	$(BIN)/pip freeze --exclude-editable >> .ci/newest.tmp
	mv .ci/newest.tmp .ci/newest.txt

# The originals that rewards are compared with: apart from .venv, for they pin what nobody can install any more.
parity: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --no-deps --upgrade --target .parity hpsv2==1.2.0 image-reward==1.5

plan: $(VENV)/.installed
	$(BIN)/egrpo plan $(RECIPE) $(ARGS)

# What is generated in docs/: the configuration reference, and the paper's figures from the schedule and recorded spreads.
docs: $(VENV)/.installed-dev
	$(BIN)/egrpo settings > docs/configuration.md
	$(BIN)/python benchmarks/paper_figures.py $(ARGS)

learning: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/learning.py $(ARGS)

# Every method at equal model evaluations; E-GRPO with one thing changed. A finished run is not run again.
compare ablations: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/studies.py $@ $(ARGS)

# What a run survives: kill -9, signals, damaged files, full disks, bad numbers. Ends with a table of figures.
faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/faults tests/config/test_fuzz.py -m "slow or not slow" -q $(ARGS)

# A thousand iterations of a tiny run: memory, open files, metrics.
soak: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/soak.py $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks -o python_files='*.py' --benchmark-columns=min,median,max $(ARGS)

# One iteration by phase and op: a trace and a table in runs/profile.
profile: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/iteration.py --profile runs/profile $(ARGS)

plot: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/plot.py

# Tests, training and benchmarks on a GPU that perhaps has no network: no .venv is made.
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh $(ARGS)

# The extension's tests with the library built under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.installed-dev
	EGRPO_BUILD=cpu EGRPO_SANITIZE=1 $(BIN)/python setup.py build_ext --build-lib build/sanitize --build-temp build/sanitize
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  EGRPO_EXTENSION=build/sanitize/egrpo_fast/kernels/extension/_C.abi3.so \
	  $(BIN)/python -m pytest tests/extension -q --ignore tests/extension/test_kernel.py

# Registers, stack and spills of every CUDA and Triton kernel, compiled for sm_80, sm_90 and sm_100.
resources: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -rA -s -q tests/extension/test_kernel.py tests/kernels/test_compile_ahead.py

# torch and the build tools come first: the extension is built against the torch it will run with.
$(VENV)/.torch: $(CONSTRAINTS)
	@echo "== set-up, once: $(VENV), then torch and the build tools"
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(INSTALL) "torch>=2.10" torchvision ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*)
	@echo "== set-up, once: egrpo_fast and what it needs"
	$(INSTALL) --no-build-isolation --editable ".[evaluation,http]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "== set-up, once: the tools of the tests"
	$(INSTALL) --no-build-isolation --editable ".[evaluation,http,quantized,datasets,dev]"
	$(BIN)/pip check
	@touch $@

clean:
	rm -rf .venv .venv-oldest build *.egg-info
