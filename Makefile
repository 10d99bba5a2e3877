# Kvasir's commands; CI runs exactly these. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard proto/kvasir_proto/v1/*.proto)
NATIVE := $(shell find engine/native kvstore/native -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)

.DEFAULT_GOAL := help
.PHONY: help build demo test check gen format bench e2e clean

help: ## list these commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

build: $(VENV)/.built ## virtual environment and native parts (3 to 6 minutes the first time)

$(VENV)/bin/python:
	@echo '== creating the virtual environment $(VENV)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Kvasir needs Python 3.11 or newer; set PYTHON=...'; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.built: $(VENV)/bin/python pyproject.toml CMakeLists.txt $(NATIVE)
	@echo '== installing Python packages and compiling the native parts'
	@$(BIN)/python -m pip install --progress-bar off -q 'scikit-build-core>=0.10' 'nanobind>=2.4' 'cmake>=3.18' 'ninja'
	@$(BIN)/python -m pip install --progress-bar off -q --no-build-isolation -e '.[dev]'
	@touch $@

gen: build ## regenerate protobuf stubs, CRDs and docs from their sources
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --grpc_python_out=proto \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --mypy_out=proto --mypy_grpc_out=proto $(PROTOS)
