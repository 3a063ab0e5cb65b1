# make serve    install into .venv and serve the demo model on http://127.0.0.1:8000
# make test     install what the tests need and run them all, with lint and types
# DEVICE=cuda   the CUDA plugin and its torch instead of the CPU's
PYTHON ?= python3
VENV   ?= .venv
DEVICE ?= cpu
MODEL  ?= demo
PORT   ?= 8000
BIN     = $(VENV)/bin
# A torch in the environment that satisfies the range is kept, whatever build it is.
TORCH_cpu  = torch==2.13.0
TORCH      = $(or $(TORCH_$(DEVICE)),torch>=2.11)

# The library that the GPU plugins share.
KERNELS = $(if $(filter cuda rocm xpu,$(DEVICE)),-e ./plugins/triton)

.PHONY: help install install-test serve test unit sanitize lint types docs clean
help:
	@sed -n '1,3s/^# //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Quire needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.torch-$(DEVICE): $(BIN)/python
	@$(BIN)/python -c 'from importlib.metadata import version as v; import sys; \
	  sys.exit(tuple(map(int, v("torch").split(".")[:2])) < (2, 11))' 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.installed-$(DEVICE): $(VENV)/.torch-$(DEVICE) core/pyproject.toml plugins/$(DEVICE)/pyproject.toml server/pyproject.toml
	$(BIN)/python -m pip install --quiet -e ./core $(KERNELS) -e ./plugins/$(DEVICE) -e ./server
	@touch $@

$(VENV)/.installed-test: $(VENV)/.torch-cpu pyproject.toml $(wildcard */pyproject.toml plugins/*/pyproject.toml)
	$(BIN)/python -m pip install --quiet -e "./core[conformance,plot]" -e ./plugins/cpu -e ./plugins/triton -e ./plugins/cuda \
	  -e ./plugins/example -e ./server --group test
	@touch $@

install: $(VENV)/.installed-$(DEVICE)
install-test: $(VENV)/.installed-test

serve: install
	$(BIN)/quire serve $(MODEL) --device $(DEVICE) --port $(PORT)

test: install-test lint types unit sanitize

unit: install-test
	$(BIN)/python -m pytest tests -n 2 --dist loadfile

# The CPU's kernels under the address and undefined-behaviour sanitizers, built in build/sanitize.
sanitize: install-test
	@$(BIN)/python -c 'import nanobind' 2>/dev/null || $(BIN)/python -m pip install --quiet "nanobind>=2.4"
	@command -v cmake >/dev/null || test -x $(BIN)/cmake || $(BIN)/python -m pip install --quiet cmake
	PATH="$(abspath $(BIN)):$$PATH" PYTHON=$(BIN)/python tests/native/sanitize.sh -n 2

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-test
	$(BIN)/mypy

docs: install-test
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/how_known.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache
