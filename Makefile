# Two commands for a fresh machine: `make demo` and `make test`. Both make their own .venv here first.
# Variables, each settable on the command line:
PYTHON ?= python3
# Exact versions, as CI tests them; empty: the newest that pyproject.toml admits.
CONSTRAINTS ?= constraints.txt
# Where pip finds a CPU-only torch, e.g. https://download.pytorch.org/whl/cpu; empty: PyPI, whose torch brings CUDA.
TORCH_INDEX ?=
PIP_FLAGS ?=
PYTEST_FLAGS ?=
# Processes that run tests; each takes up to 2 GB, and many tests use several cores by themselves.
TEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,timm,openvino,tensorboard,rtx,dev
DEMO := runs/demo

.PHONY: help setup demo test lint clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON=$(PYTHON) CONSTRAINTS=$(CONSTRAINTS) TORCH_INDEX=$(TORCH_INDEX) PIP_FLAGS=$(PIP_FLAGS) PYTEST_FLAGS=$(PYTEST_FLAGS) TEST_WORKERS=$(TEST_WORKERS)"

setup:  ## .venv with everything installed (quick when nothing changed)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" EXTRAS="$(EXTRAS)" CONSTRAINTS="$(CONSTRAINTS)" TORCH_INDEX="$(TORCH_INDEX)" \
		PIP_FLAGS="$(PIP_FLAGS)" sh tools/setup_venv.sh

demo: setup  ## train a small plain network, export it, bench it (under 4 minutes on 2 cores)
	$(BIN)/rd-train digits --out $(DEMO) --overwrite
	$(BIN)/rd-export $(DEMO)/model.pt
	$(BIN)/rd-bench $(DEMO)/model.pt --batch 1 --seconds 5 --out $(DEMO)/bench
	@printf '%s\n' "" "Made, in $(CURDIR):" \
		"  $(DEMO)/report.html                the training, read this first, in a browser (report.md without one)" \
		"  $(DEMO)/model.pt, model.onnx       the network without shortcuts: checkpoint, and folded for deployment" \
		"  $(DEMO)/bench/bench.png, bench.json, memory.png   speed and memory against the ResNet it came from"

# Files in their order: those with the fewest tests, which xdist would run last, are the longest ones here.
test: lint  ## everything that CI runs: lint, then the tests, those of the C++ engine among them
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0 $(PYTEST_FLAGS)

lint: setup  ## ruff, clang-format, hadolint on the Dockerfiles, and the C++ engine without a warning
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find rd_deploy tests examples -name '*.cpp' -o -name '*.h' -o -name '*.c' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/hadolint docker/*.Dockerfile
	@for compiler in g++ clang++; do \
		if command -v $$compiler >/dev/null 2>&1; then \
			$(BIN)/python rd_deploy/native/build.py --werror --compiler $$compiler --output build/lint-$$compiler || exit; \
		else echo "lint: no $$compiler here: it checks nothing"; fi; \
	done

clean:  ## remove .venv, builds and caches (runs/ stays: it holds what you trained)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis rd_deploy/native/librd.*
