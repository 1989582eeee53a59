# One line a target. A virtual environment is made where there is none; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SECONDS ?= 20
PROTO := src/kapsl_scheduler/server/proto

.PHONY: demo serve test check fmt stress screenshots proto clients bench soak clean

demo: $(VENV)/.run  ## the digits model over HTTP, live and throughput traffic at once
	$(BIN)/kapsl-scheduler demo --seconds $(SECONDS)

serve: $(VENV)/.run  ## serve the digits model until stopped
	$(BIN)/kapsl-scheduler demo --serve

test: $(VENV)/.dev  ## every test
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## the tests with coverage, and everything else that must hold
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/coverage erase && $(BIN)/coverage run -m pytest && $(BIN)/coverage combine -q && $(BIN)/coverage report
	$(BIN)/kapsl-scheduler demo --seconds 5

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

stress: $(VENV)/.dev  ## 100,000 simulated arrivals and many more examples for each property
	KAPSL_STRESS=1 HYPOTHESIS_PROFILE=stress $(BIN)/python -m pytest tests/core tests/sim --timeout 3600

screenshots: $(VENV)/.dev  ## pictures of the dashboard, on a desk and on a phone, light and dark: build/screenshots
	$(BIN)/python -m pytest tests/e2e/test_dashboard.py -k every_view

proto: $(VENV)/.dev  ## compile the messages of gRPC anew, after a change of a .proto file
	$(BIN)/python -m grpc_tools.protoc --proto_path $(PROTO) --descriptor_set_out $(PROTO)/descriptors.binpb $(notdir $(sort $(wildcard $(PROTO)/*.proto)))

clients: $(VENV)-clients/.done $(VENV)-mlserver/.done  ## clients that need environments of their own, for tests/e2e/test_other_clients.py

bench: $(VENV)/.bench  ## speed against the engine and against other batchers; see docs/benchmarks.md
	$(BIN)/python -m benchmarks all --peers

soak: $(VENV)/.run  ## a server at 0.8 of its capacity for ten minutes: memory, and what became of every request
	$(BIN)/python -m benchmarks soak --check

clean:
	rm -rf $(VENV) $(VENV)-clients $(VENV)-mlserver .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[onnx,server,grpc]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[onnx,server,grpc,dev]'
	touch $@ $(VENV)/.run

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[onnx,server,grpc,bench]'
	touch $@

$(VENV)-%/.done: tests/e2e/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	touch $@
