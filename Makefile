# `make demo` shows meshgpu on this computer, `make test` proves it. Both set up what they need.
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PYTHON ?= python3

.PHONY: help demo demo-burst test check sim sim-long fuzz benchmarks proto lock clean
.DEFAULT_GOAL := help

help:           ## list what can be made
	@sed -n 's/^\([a-z-]*\): *\([^#]*\)## */  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

$(READY): pyproject.toml packaging/requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "meshgpu needs Python 3.11 or newer")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r packaging/requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: $(READY)  ## three agents on loopback: find each other, form a mesh, train a model on a machine found by name
	@$(BIN)/python examples/demo.py

demo-burst: $(READY)  ## a sweep that overflows into a local cloud, and an owner who takes his GPU back; needs root
	@$(BIN)/python -m examples.demo_burst

test: check     ## everything: `check`, then all tests
	$(BIN)/pytest -n 2 --dist loadfile -m "slow or hosts"

check: $(READY) ## the fast loop: format, lint, types, architecture, generated code, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest -n 2 -m "not slow and not hosts"

sim: $(READY)   ## simulate meshes beside memberlist, e.g. make sim ARGS="--nodes 300 --seconds 60 --plot sim.svg"
	@$(BIN)/meshgpu sim $(ARGS)

sim-long: $(READY) ## simulate many more seeds than CI does
	$(BIN)/python -m tests.sim.soak
	$(BIN)/python -m tests.sim.soak --renting

fuzz: $(READY)  ## 100,000 forged, mutated, replayed frames against real nodes, then bytes of all kinds against the parsers
	$(BIN)/python -m tests.fuzz
	$(BIN)/python -m tests.fuzz_parsers

benchmarks: $(READY) ## the numbers in docs/benchmarks.md, peers beside them
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/trust.py
	$(BIN)/python -m benchmarks.mesh

proto: $(READY) ## regenerate meshgpu/wire/v1 from proto/
	$(BIN)/python -m grpc_tools.protoc -Iproto --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --python_out=. --mypy_out=quiet:. proto/meshgpu/wire/v1/*.proto

lock:           ## resolve the dependencies anew
	$(BIN)/uv pip compile pyproject.toml --group dev --generate-hashes --universal --no-header --quiet \
	  --output-file packaging/requirements.lock --upgrade

clean:          ## forget the virtual environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .demo
