# Every goal except gpu first makes its own environment, $(VENV), with $(PYTHON), pip and constraints.txt. The goal gpu
# runs in $(PYTHON) itself, with the torch and the Triton that are installed there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.sparsekit-installed
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/cpu/*)
TORCH := $(shell grep '^torch==' constraints.txt)
ARGS ?=

.PHONY: help demo tiers ddpm maskpro maskpro-llm distilbert radd test test-slow test-all bench rivals gpu lint wheel sanitize clean

help:
	@echo 'make demo       train a small language model, make it 2:4 sparse, run it faster than dense'
	@echo 'make tiers      prune a small language model by progressive tiers, and compare with one-shot pruning'
	@echo 'make ddpm       train a diffusion model of digits, draw images by it, evaluate and prune it (minutes on 2 cores)'
	@echo 'make maskpro    learn 2:4 masks for a diffusion model without gradients, fine-tune and test them (minutes on 2 cores)'
	@echo 'make maskpro-llm  learn 2:4 masks for a language model without gradients, and compare perplexities (minutes on 2 cores)'
	@echo 'make distilbert  distill, prune, slim and quantize a classifier of sentences, in one report (minutes on 2 cores)'
	@echo 'make radd       train a diffusion model of text, draw texts by it, evaluate and prune it (minutes on 2 cores)'
	@echo 'make test       run the test suite without slow tests (under 6 minutes on 2 cores)'
	@echo 'make test-all   run the whole test suite (under 20 minutes)'
	@echo 'make bench      time every op against its baselines, write bench/results/ (about 12 minutes)'
	@echo 'make rivals     time whole models against ONNX Runtime, OpenVINO and torch.compile (about 30 minutes)'
	@echo 'make gpu        on a machine with a GPU: build into $$(PYTHON) itself, measure (under 6 minutes), test'
	@echo 'make lint       ruff format, ruff check, mypy'
	@echo 'make wheel      build the wheel and the source distribution into dist/'
	@echo 'make sanitize   run the C++ tests under ASan and UBSan'
	@echo 'make clean      remove all build products, keep $(VENV)'
	@echo
	@echo 'ARGS="..." is passed on to demo, tiers, ddpm, maskpro, maskpro-llm, distilbert, radd, test, rivals and gpu. PYTHON=python3.12 chooses the Python. SPARSEKIT_NATIVE=1'
	@echo 'requires the compiled kernels, 0 never builds them. For a torch without CUDA, a tenth of the download:'
	@echo '  export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu'

$(INSTALLED): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "sparsekit needs Python 3.10 or later, $(PYTHON) is older or missing: make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make an environment; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo 'Installing into $(VENV) (torch is a large download the first time) ...'
	@$(BIN)/python -m pip install -q -c constraints.txt '$(TORCH)' setuptools ninja
	@$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev,cli,examples,systems]'
	@$(BIN)/python -c 'from sparsekit.ops import simd_level; print("sparsekit is installed; CPU kernels:", simd_level())'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/quickstart/run.py $(ARGS)

tiers: $(INSTALLED)
	$(BIN)/python examples/three_tier/run.py $(ARGS)

ddpm: $(INSTALLED)
	$(BIN)/python examples/ddpm/run.py $(ARGS)

maskpro: $(INSTALLED)
	$(BIN)/python examples/maskpro_ddpm/run.py $(ARGS)

maskpro-llm: $(INSTALLED)
	$(BIN)/python examples/maskpro_llm/run.py $(ARGS)

distilbert: $(INSTALLED)
	$(BIN)/python examples/distilbert/run.py $(ARGS)

radd: $(INSTALLED)
	$(BIN)/python examples/radd/run.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow' $(ARGS)

# One test at a time, because some measure speed and some start several processes.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(ARGS)

test-all: test test-slow

bench: $(INSTALLED)
	$(BIN)/python -m bench

# The other libraries have an environment of their own, because they pin versions of what they share with the tests.
rivals:
	@$(MAKE) --no-print-directory VENV=.venv-rivals .venv-rivals/.sparsekit-installed
	@.venv-rivals/bin/python -m pip install -q -c constraints.txt -r bench/rivals/requirements.txt
	.venv-rivals/bin/python -m bench.rivals $(ARGS)

# A build that fails does not prevent the measurements, nor does a failing test. Only files with tests for a GPU are
# collected, because importing the others may need packages that are not installed here.
gpu:
	-$(PYTHON) -m pip install -q --no-index --no-build-isolation --no-deps -e .
	$(PYTHON) -m bench.gpu $(ARGS)
	-SPARSEKIT_TUNE_CACHE=0 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 timeout -s INT 240 $(PYTHON) -m pytest -q -rfExX -m 'triton or gpu' -p bench.gpu -p no:cacheprovider \
	  $(if $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo yes),-p xdist.plugin -n 8) \
	  --continue-on-collection-errors -o filterwarnings=default --junitxml build/gpu/tests.xml \
	  $(shell grep -lE 'mark\.(triton|gpu)' tests/test_*.py)
	-timeout 60 ncu --target-processes all --clock-control none --profile-from-start off --set full --page raw --csv \
	  --log-file build/gpu/counters.csv \
	  $(PYTHON) -c 'from bench.gpu.products import profile; profile("build/gpu/sections")'

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(INSTALLED)
	$(BIN)/python -m build --no-isolation --outdir dist .

sanitize: $(INSTALLED)
	$(MAKE) -C tests/cpp sanitize

clean:
	rm -rf build dist *.egg-info sparsekit/_C.* sparsekit/_build.json .pytest_cache .hypothesis .mypy_cache .ruff_cache tests/cpp/build \
	  $(INSTALLED)
