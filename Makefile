# `make demo` and `make test` do all the set-up they need. Other targets: test-slow, test-peers, test-versions, lint,
# docs, memory, bench, bench-peers, gpu, gpu-kernels, wheel, lock, clean.

PYTHON ?= python3
# What is installed is what was tested: constraints.txt names a version of everything, `make lock` renews it. torch comes
# with CUDA where PyPI has it (Linux). Without a GPU a CPU build of the same version is quicker to get: point pip at one,
# as pytorch.org says.
LOCKED = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
TORCH = torch==2.13.0
# Not in constraints.txt: torch with CUDA brings its own. Beside a CPU build this one is interpreted and compiled for
# GPUs that needn't be here: the oldest that is supported.
TRITON = triton==3.6.0
# These ask for versions that clash with the rest, or for vllm: they are installed without what they ask for, and with
# what is used of it.
PEERS_ALONE = 'sae-bench==0.6.0' 'sae-dashboard==0.8.*' 'eai-delphi==0.1.*'
PEERS_ALONE_NEED = 'eindex-callum==0.1.*' 'dataclasses-json==0.6.*' asyncer blobfile faiss-cpu orjson sentence-transformers
PEERS_PACKAGES = 'sae-lens==6.54.*' 'eai-sparsify==1.3.*' 'dictionary-learning==0.1.*' 'pytest>=8' 'pytest-xdist>=3.6' tabulate

# A process a core, each with one thread: tests of threads ask for theirs.
PARALLEL = -n logical --maxprocesses 8 --dist worksteal

bin = .venv/bin
ready = .venv/.ready
peers_bin = .venv-peers/bin
peers_ready = .venv-peers/.ready

.PHONY: demo test test-slow test-peers test-versions lint docs memory gpu gpu-kernels bench peers bench-peers wheel lock clean

demo: $(ready)
	$(bin)/csae demo

test: $(ready)
	OMP_NUM_THREADS=1 $(bin)/python -m pytest $(PARALLEL)

test-slow: $(ready)
	OMP_NUM_THREADS=1 $(bin)/python -m pytest $(PARALLEL) -m slow

lint: $(ready)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')
	$(bin)/mypy

# site/, from docs/ and the docstrings; a warning is an error.
docs: $(ready)
	$(bin)/mkdocs build --quiet --strict

memory: $(ready)
	$(bin)/python -m csae.bench.memory

# On a machine with an NVIDIA GPU, with the environment or with the Python that is there; run twice. OUT=folder for a copy
# of all results; PEERS=folder of wheels; COMPILED=folder that `make gpu-kernels` filled, without a GPU.
gpu:
	$(or $(wildcard $(bin)/python),$(PYTHON)) -m csae.bench.gpu $(if $(OUT),--out $(OUT)) $(if $(PEERS),--peers $(PEERS)) \
		$(if $(COMPILED),--compiled $(COMPILED))

gpu-kernels: $(ready)
	$(bin)/python -m csae.bench.compiled $(or $(COMPILED),build/compiled)

bench: $(ready)
	$(bin)/csae bench

# Other SAE libraries, which the benchmark compares with and csae works with, are kept apart: they ask for much, and
# some of it clashes.
peers: $(peers_ready)

bench-peers: $(peers_ready)
	$(peers_bin)/csae bench

# What works with those libraries, tested with them.
test-peers: $(peers_ready)
	$(peers_bin)/python -m pytest -m 'slow or not slow' tests/test_logs.py
	OMP_NUM_THREADS=1 $(peers_bin)/python -m pytest $(PARALLEL) tests/patches tests/interop tests/export \
		tests/test_readme.py -k 'not make'

# The tests that touch other libraries, at the oldest and the newest version of each; ENVIRONMENTS="name name": only
# those. Several gigabytes an environment. What was run is written into docs/versions.md.
test-versions: $(ready)
	$(bin)/python tests/versions.py $(ENVIRONMENTS)

# A wheel that says which systems it runs on (manylinux), in dist/.
wheel: $(ready)
	rm -rf build/wheel
	$(LOCKED) $(bin)/python -m build --wheel --outdir build/wheel
	PATH="$(CURDIR)/$(bin):$$PATH" $(bin)/python -m auditwheel repair --wheel-dir dist build/wheel/*.whl

# The newest versions that pyproject.toml and the other SAE libraries allow together, beside this torch, for every
# Python that is supported.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	{ echo "# Versions that were tested, installed by \`make\`; renewed by \`make lock\`."; \
	  printf '%s\n' '$(TORCH)' $(PEERS_PACKAGES) $$($(PYTHON) -c "$$build_requires") \
	  | .venv-lock/bin/uv pip compile --no-emit-package triton --quiet --universal --python-version 3.11 --all-extras \
	    --no-header --no-annotate --no-emit-index-url pyproject.toml -; } > constraints.new
	mv constraints.new constraints.txt

define build_requires
import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")
endef
export build_requires

sources = pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard kernels/cpu/src/*.* kernels/cpu/src/*/*)

$(ready): $(sources)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "csae needs Python 3.11 or newer; given $$($(PYTHON) --version): make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(LOCKED) $(bin)/python -m pip install --quiet torch
	$(bin)/python -c 'import triton' 2>/dev/null || $(bin)/python -m pip install --quiet '$(TRITON)'
	$(LOCKED) $(bin)/python -m pip install --quiet --editable '.[cli,datasets,dev,docs,evidence]'
	touch $@

# torchvision, which the peers ask for, goes at the end: where it doesn't fit this torch, `import transformers` fails.
$(peers_ready): $(sources)
	$(PYTHON) -m venv .venv-peers
	$(LOCKED) $(peers_bin)/python -m pip install --quiet torch
	$(peers_bin)/python -c 'import triton' 2>/dev/null || $(peers_bin)/python -m pip install --quiet '$(TRITON)'
	$(LOCKED) $(peers_bin)/python -m pip install --quiet --editable '.[cli,wandb,trackio,tensorboard]' $(PEERS_PACKAGES)
	$(LOCKED) $(peers_bin)/python -m pip install --quiet $(PEERS_ALONE_NEED)
	$(peers_bin)/python -m pip install --quiet --no-deps $(PEERS_ALONE)
	$(peers_bin)/python -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf .venv .venv-peers .venv-lock .venv-versions build dist site demo runs *.egg-info kernels/cpu/*.so
