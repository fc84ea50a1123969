# make demo · make quick · make test · make slow · make lint · make gate · make docs: each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
RUN ?= runs/demo
GATE ?= build/gate

.PHONY: demo quick test slow lint gate docs clean

demo: $(READY)
	$(BIN)/compress prune smollm2-135m --recipe tyr-demo --out $(RUN)
	@echo
	@echo "the model card:   $(RUN)/release/README.md"
	@echo "the plots:        $(RUN)/release/plots/"
	@echo "the pruned model: $(RUN)/model/   and as ONNX: $(RUN)/release/onnx/"
	test -d $(RUN)-gguf || $(BIN)/compress export $(RUN) --format gguf --precision q8_0 --out $(RUN)-gguf
	@echo
	@echo "for llama.cpp:    $(RUN)-gguf/gguf-q8_0/   and there it goes on with a text:"
	@echo "                  $(BIN)/compress run $(RUN)-gguf/gguf-q8_0 'The sea' --tokens 32"

# A worker that crashes ends the run with the test that it was in: started anew, pytest-xdist waits for ever.
TWO = -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: $(READY)
	$(BIN)/pytest -m "not slow" $(TWO)

quick: $(READY)
	$(BIN)/pytest -m "not slow and not processes" $(TWO)

slow: $(READY)
	$(BIN)/pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

# Inconclusive (a busy machine) does not fail it, slower does.
gate: $(READY)
	PYTHONPATH=. $(BIN)/python tools/ci/models.py $(GATE)
	GATE_COMPRESS=$(BIN)/compress GATE_BASELINE=$(GATE)/dense.onnx GATE_CANDIDATE=$(GATE)/pruned.onnx GATE_OUT=$(GATE)/out \
		GATE_BUDGETS='latency<=0.95x,memory<=1.05x,size<=0.7x' OMP_NUM_THREADS=1 tools/ci/gate.sh

# The site, in build/site; a link that leads nowhere fails it.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site: build/site/index.html"

.venv/docs: $(READY)
	$(BIN)/python -P -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# An install under this project's old name would stay beside the new one, with the same command and imports.
	$(BIN)/python -P compress/distribution.py
	rm -rf compress.egg-info
	$(BIN)/python -P -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
