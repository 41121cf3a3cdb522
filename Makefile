# `make demo` and `make test` do all the set-up they need. Other targets: test-slow, test-peers, lint, memory, bench,
# bench-peers, gpu, clean.

PYTHON ?= python3
# CUDA where PyPI has it (Linux). Without a GPU a CPU build is quicker to get: point pip at one, as pytorch.org says.
TORCH ?= torch==2.13.0
# A CPU build of torch brings no triton; its kernels are then interpreted and compiled, and tested with the oldest
# version supported.
TRITON ?= triton==3.6.0

bin = .venv/bin
ready = .venv/.ready
peers_bin = .venv-peers/bin
peers_ready = .venv-peers/.ready

.PHONY: demo test test-slow test-peers lint memory gpu bench peers bench-peers clean

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
	$(bin)/csae bench

# Other SAE libraries, which the benchmark compares with and csae works with, are kept apart: they ask for much, and
# some of it clashes.
peers: $(peers_ready)

bench-peers: $(peers_ready)
	$(peers_bin)/csae bench

# What works with those libraries, tested with them.
test-peers: $(peers_ready)
	$(peers_bin)/python -m pytest tests/patches tests/interop tests/test_readme.py -k 'not make'

$(ready): pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/cpu/src/*.* kernels/cpu/src/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "csae needs Python 3.11 or newer; given $$($(PYTHON) --version): make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(bin)/python -m pip install --quiet "$(TORCH)"
	$(bin)/python -c 'import triton' 2>/dev/null || $(bin)/python -m pip install --quiet "$(TRITON)"
	$(bin)/python -m pip install --quiet --editable '.[cli,datasets,dev]'
	touch $@

# torch is named again beside the peers, or torchvision, which they ask for, would bring another one. It goes at the
# end: where it doesn't fit this torch, `import transformers` fails. SAEBench asks for older versions than work with it.
$(peers_ready): pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/cpu/src/*.* kernels/cpu/src/*/*)
	$(PYTHON) -m venv .venv-peers
	$(peers_bin)/python -m pip install --quiet "$(TORCH)"
	$(peers_bin)/python -c 'import triton' 2>/dev/null || $(peers_bin)/python -m pip install --quiet "$(TRITON)"
	$(peers_bin)/python -m pip install --quiet "$(TORCH)" --editable '.[cli]' \
		'sae-lens==6.54.*' 'eai-sparsify==1.3.*' 'dictionary-learning==0.1.*' 'pytest>=8'
	$(peers_bin)/python -m pip install --quiet --no-deps 'sae-bench==0.6.*' tabulate
	$(peers_bin)/python -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf .venv .venv-peers build dist demo runs *.egg-info kernels/cpu/*.so
