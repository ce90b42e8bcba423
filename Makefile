# Each target sets up what it needs: a virtual environment in .venv, installed under constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-compiled test-interpreted lint audit test-slow gpu-test clean

demo: $(INSTALLED)
	$(BIN)/python -m daam.recipes.digits $(ARGS)

# Two processes, one a core: interpreted kernels cannot be compiled ahead of time.
test: lint
	$(MAKE) --jobs=2 --output-sync=target test-compiled test-interpreted

test-compiled: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not kernel and not audit and not slow"

test-interpreted: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "kernel and not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every shipped configuration on every target, ahead of time.
audit: $(INSTALLED)
	$(BIN)/python -m pytest -q -m audit

# The full product of cases in the interpreter.
test-slow: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m slow

# The kernel tests on a GPU, with whatever torch and Triton PYTHON has.
gpu-test:
	$(PYTHON) -m pytest -q -m "kernel and not slow" --device cuda

clean:
	rm -rf .venv demo-output

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
