# Kvasir's commands; CI runs exactly these. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard proto/kvasir_proto/v1/*.proto)
NATIVE := $(shell find engine/native kvstore/native router/native -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
PACKAGES := operator router kvstore engine proto sim cli
SANITIZED := $(addprefix tests/engine_native/test_,$(addsuffix .py,attention batch_invariance families kv_move native_step parity products rope sampler weight_formats)) \
  $(addprefix tests/kvstore/test_,$(addsuffix .py,arena block_names codec codec_transfer encryption pool priorities remote_reads shared_memory stripes transfer wire_faults)) \
  tests/router/test_core_prefix.py
BENCH_ENGINE := $(BIN)/kvasir bench engine --model .cache/qwen3-0.6b
ONE_THREAD := --threads 1 --prompt 512 --batch 1
GENERATED := proto/kvasir_proto/v1 crds helm/kvasir docs/api.md

.DEFAULT_GOAL := help
.PHONY: help build demo test test-api check lint types drift gen format bench sanitize cuda e2e e2e-scale clean redis

help: ## list these commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

build: $(VENV)/.built ## virtual environment and native parts (2 to 6 minutes the first time)

demo: build ## a local fleet serves a two-turn chat (KEEP=1 leaves it up)
	@KEEP=$(KEEP) $(BIN)/kvasir demo

test: build redis ## every test that needs no cluster
	$(BIN)/python -m pytest

test-api: build ## the operator on a real API server: programs of KUBEBUILDER_ASSETS, else of kind's node image
	@[ -n "$$KUBEBUILDER_ASSETS" ] || e2e/kube-assets .cache/kube-assets
	KUBEBUILDER_ASSETS=$${KUBEBUILDER_ASSETS:-$(CURDIR)/.cache/kube-assets} \
	  $(BIN)/python -m pytest tests/operator/test_*on_kube_api.py tests/operator/test_scale_bench.py

check: lint types drift ## style, types, layers and generated files

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	find engine/native engine/cuda kvstore/native router/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/python -m pytest -q tests/test_tidy.py
	@ls $(SANITIZED) >/dev/null  # what `sanitize` runs is there

types: build
	$(BIN)/mypy

drift: gen
	@git diff --exit-code --stat -- $(GENERATED) && test -z "$$(git ls-files --others --exclude-standard -- $(GENERATED))" \
	  || { echo 'Generated files differ from their sources: run make gen and commit the result.'; exit 1; }

gen: build ## regenerate protobuf stubs, CRDs and docs/api.md from their sources
	@$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --grpc_python_out=proto \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --mypy_out=quiet:proto --mypy_grpc_out=quiet:proto $(PROTOS)
	@$(BIN)/python -m kvasir_operator.crdgen

format: build ## rewrite Python and C++ files in the project's format
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	find engine/native engine/cuda kvstore/native router/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format -i

bench: build ## engine, KV transfer, serving and routing figures into bench/results
	$(BIN)/kvasir model make qwen3-0.6b .cache/qwen3-0.6b
	$(BENCH_ENGINE) --json bench/results/engine-bf16.json
	$(BENCH_ENGINE) --weights int8 --kv int8 --json bench/results/engine-int8.json
	$(BENCH_ENGINE) --weights int4 --kv int8 --json bench/results/engine-int4.json
	$(BENCH_ENGINE) $(ONE_THREAD) --json bench/results/engine-bf16-one-thread.json
	$(BENCH_ENGINE) $(ONE_THREAD) --weights int8 --kv int8 --json bench/results/engine-int8-one-thread.json
	$(BENCH_ENGINE) $(ONE_THREAD) --weights int4 --kv int8 --json bench/results/engine-int4-one-thread.json
	$(BIN)/kvasir bench kv --json bench/results/kv.json
	$(BIN)/kvasir bench serve --model .cache/qwen3-0.6b --json bench/results/serve.json
	$(BIN)/python bench/router.py --json bench/results/router.json

# -S: without the editable install, whose native parts would be found first.
sanitize: build ## the native parts under AddressSanitizer and UBSan, the thread pool under ThreadSanitizer
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --upgrade --target build/sanitize/python \
	  -C build-dir=build/sanitize/cmake -C cmake.build-type=RelWithDebInfo -C cmake.define.KVASIR_SANITIZE=ON .
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH="build/sanitize/python:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  $(BIN)/python -S -m pytest -q -p no:cacheprovider --timeout 600 $(SANITIZED)
	c++ -std=c++20 -O1 -g -fsanitize=thread -Iengine/native/src engine/native/tests/pool_stress.cpp \
	  engine/native/src/thread_pool.cpp -o build/pool_stress -pthread
	build/pool_stress

cuda: build ## the engine's CUDA device (nvcc of CUDA_HOME or the PATH, else from PyPI)
	@[ -n "$$CUDA_HOME" ] || command -v nvcc >/dev/null || $(BIN)/python -m pip install -q 'nvidia-cuda-nvcc>=13.0'
	$(BIN)/python engine/cuda/cuda_build.py

e2e: build ## the whole on a real Kubernetes cluster (KUBECONFIG's, else a new kind cluster)
	$(BIN)/python -m pytest e2e -p no:cacheprovider --timeout 900 -s

e2e-scale: build ## the operator with 1,000 pools and 10,000 pods on an API server alone (KUBEBUILDER_ASSETS) or on kind
	$(BIN)/python e2e/scale/scale.py --json bench/results/operator-scale.json

redis:
	@command -v redis-server >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && echo '== installing redis-server' && apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server >/dev/null; } \
	  || { echo 'The tests need redis-server on the PATH: sudo apt-get install redis-server'; exit 1; }

clean: ## remove the virtual environment and build folders
	rm -rf $(VENV) build .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Kvasir needs Python 3.11 or newer: make PYTHON=/path/to/python3 ...'; exit 1; }
	@echo '== creating the virtual environment $(VENV)'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.built: $(VENV)/bin/python pyproject.toml CMakeLists.txt $(NATIVE)
	@echo '== installing Python packages and compiling the native parts (log: build/install.log)'
	@mkdir -p build && set -o pipefail && { \
	  $(BIN)/python -m pip install --progress-bar off 'scikit-build-core>=0.10' 'nanobind>=2.4' 'cmake>=3.18' ninja && \
	  $(BIN)/python -m pip install --progress-bar off -v --no-build-isolation -e '.[dev]'; } 2>&1 \
	  | tee build/install.log | sed -unE 's/^ *Collecting ([^ <>=!;]+).*/  \1/p; s/^ *(\[[0-9]+\/[0-9]+\]) [A-Z].*\/([^/ ]+)$$/  \1 \2/p' \
	  || { tail -40 build/install.log; exit 1; }
	@touch $@
