# `make demo` and `make test` do all the set-up they need. Other targets: test-slow, lint, memory, bench, gpu, clean.

PYTHON ?= python3
# CUDA where PyPI has it (Linux). Without a GPU a CPU build is quicker to get: point pip at one, as pytorch.org says.
TORCH ?= torch==2.13.0
# A CPU build of torch brings no triton; its kernels are then interpreted and compiled, and tested with the oldest
# version supported.
TRITON ?= triton==3.6.0

bin = .venv/bin
ready = .venv/.ready

.PHONY: demo test test-slow lint memory gpu bench clean

demo: $(ready)
	$(bin)/csae demo

test: $(ready)
	$(bin)/python -m pytest

test-slow: $(ready)
	$(bin)/python -m pytest -m slow

lint: $(ready)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

memory: $(ready)
	$(bin)/python -m bench.memory

# On a machine with an NVIDIA GPU, with the environment or with the Python that is there. PEERS=folder of wheels.
gpu:
	$(or $(wildcard $(bin)/python),$(PYTHON)) -m bench.gpu $(if $(PEERS),--peers $(PEERS))

bench: $(ready)
	$(bin)/python -m bench.ops

$(ready): pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/cpu/src/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "csae needs Python 3.11 or newer; given $$($(PYTHON) --version): make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(bin)/python -m pip install --quiet "$(TORCH)"
	$(bin)/python -c 'import triton' 2>/dev/null || $(bin)/python -m pip install --quiet "$(TRITON)"
	$(bin)/python -m pip install --quiet --editable '.[cli,datasets,dev]'
	touch $@

clean:
	rm -rf .venv build dist demo runs *.egg-info kernels/cpu/*.so
