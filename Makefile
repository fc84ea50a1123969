# make demo · make test · make slow · make lint: each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
RUN ?= runs/demo

.PHONY: demo test slow lint clean

demo: $(READY)
	$(BIN)/compress prune smollm2-135m --recipe tyr-demo --out $(RUN)
	@echo
	@echo "the model card:   $(RUN)/release/README.md"
	@echo "the plots:        $(RUN)/release/plots/"
	@echo "the pruned model: $(RUN)/model/   and as ONNX: $(RUN)/release/onnx/"

test: $(READY)
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

slow: $(READY)
	$(BIN)/pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
