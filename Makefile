# Common commands. Each target first sets up .venv in this checkout with what it needs: `make demo` installs the core
# (about 40 packages), the others add all extras and development tools. A second run installs nothing.
#
#   make demo    apply the bundled model to the bundled images; writes demo/
#   make test    run the tests (about ten minutes on two cores); make test-slow includes slow tests
#   make test-lmms  run the plugins of lmms-eval and lm-eval inside them, in an environment of its own, .venv/lmms
#   make test-transformers4  run the tests of qlip.hf with transformers 4.57.6
#   make lint    check style and types
#   make bench   measure speed and memory of the model; close other programs first
#   make wheel   build dist/qlip-*.whl
#   make clean   delete build and test output, but not .venv
#
# pip's default PyTorch is the CUDA build on Linux (gigabytes), the CPU build elsewhere. README.md says how to choose. A
# torch that is already in .venv is not replaced.

PYTHON ?= python3
JOBS ?= auto
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
DEV := $(VENV)/.dev
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-lmms test-transformers4 lint bench wheel clean

help:
	@sed -n 's/^#   make/make/p' Makefile

setup: $(DEV)

$(CORE): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Setting up $(VENV) with $$($(PYTHON) --version) ..."; $(PYTHON) -m venv $(VENV); }
	@if $(BIN)/python -c "import torch" 2>/dev/null; then \
	    grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	    cp constraints.txt $(VENV)/constraints.txt; \
	    echo "Installing PyTorch (takes a minute or two) ..."; \
	    $(PIP) install -c constraints.txt torch numpy; \
	fi
	@echo "Installing qlip ..."
	@$(PIP) install -c $(VENV)/constraints.txt -e .
	@touch $(CORE)

$(DEV): $(CORE)
	@echo "Installing the extras and development tools ..."
	@$(PIP) install -c $(VENV)/constraints.txt -e ".[dev]"
	@touch $(DEV)

demo: $(CORE)
	@$(BIN)/qlip demo --output demo

test: $(DEV)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests
	@echo "All tests pass. Next: make lint, then read CONTRIBUTING.md for where a change belongs."

test-slow: $(DEV)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "slow or not slow" tests

# Without its dependencies: they pull torchvision, and old versions of others. What it needs here is the list below;
# torch, datasets and the rest come from .venv.
LMMS := $(VENV)/lmms
LMMS_NEEDS := accelerate psutil evaluate sacrebleu portalocker tabulate colorama lxml loguru pytablewriter \
    dataproperty mbstrdecoder pathvalidate tabledata tcolorpy typepy chardet pytz python-dotenv jsonlines openai jiter \
    tiktoken zss numexpr einops nltk openpyxl et-xmlfile av opencv-python-headless pycocoevalcap lm-eval==0.4.13 \
    rouge-score sqlitedict word2number more-itertools

$(LMMS)/.done: $(DEV)
	@$(BIN)/python -m venv $(LMMS)
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > $$($(LMMS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth
	@$(LMMS)/bin/python -m pip -qq --disable-pip-version-check install --no-deps lmms-eval==0.7.3 $(LMMS_NEEDS)
	@touch $@

test-lmms: $(LMMS)/.done
	@QLIP_LMMS_PYTHON=$(abspath $(LMMS))/bin/python $(BIN)/python -m pytest -q -m slow tests/vlm/test_lmms_eval.py \
	    tests/um3/test_lm_eval.py tests/evaluation/test_caption_scores.py

# its packages lie before .venv's on the path: one torch for both
$(VENV)/transformers4/.done: $(DEV)
	@$(PIP) install --no-deps --target $(VENV)/transformers4 transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
	@touch $@

test-transformers4: $(VENV)/transformers4/.done
	@OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/transformers4 $(BIN)/python -m pytest -q tests/hf

lint: $(DEV)
	@$(BIN)/ruff check src tests benchmarks
	@$(BIN)/ruff format --check --quiet src tests benchmarks
	@$(BIN)/mypy
	@echo "Style and types are clean."

bench: $(DEV)
	@$(BIN)/python -m benchmarks.tokenizer

wheel: $(DEV)
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . > $(VENV)/wheel.log || { cat $(VENV)/wheel.log; exit 1; }
	@ls -l dist/*.whl

clean:
	@rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Clean; $(VENV) stays (rm -r $(VENV) to set it up again)."
