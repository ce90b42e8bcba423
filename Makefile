# Each target sets up what it needs: a virtual environment in .venv, installed under constraints.txt.
PYTHON ?= python3
OUT ?= results
BIN := .venv/bin
INSTALLED := .venv/installed
SHELL := bash
.SHELLFLAGS := -o pipefail -c

AUDITS := audit-sm_80 audit-sm_90 audit-sm_100 audit-gfx942
SHARDS := 0 1 2 3 4 5 6 7

.PHONY: demo test test-compiled lint bench audit test-slow test-emulated test-emulated-sample gpu gpu-test gpu-bench gpu-compile gpu-needs clean

demo: $(INSTALLED)
	$(BIN)/python -m daam.recipes.digits $(ARGS)

# Two processes at a time, of parts that fill both cores: interpreted kernels cannot be compiled ahead of time.
test: lint
	$(MAKE) --jobs=2 --output-sync=target test-compiled $(addprefix test-interpreted-,0 1 2 3)

test-compiled: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not kernel and not emulated and not audit and not slow and not gpu"

test-interpreted-%: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "kernel and not slow" --shard $*/4

# Kernels as they are compiled for sm_90, emulated: a few small cases of every one, and wrong ones; needs gcc.
test-emulated-sample: $(INSTALLED)
	$(BIN)/python -m pytest -q -m emulated --device emulated

# The interpreter's cases, all of them, on both cores: most of an hour, since Triton compiles a thousand kernels.
test-emulated:
	$(MAKE) --jobs=2 --output-sync=target $(addprefix test-emulated-,0 1 2 3)

test-emulated-%: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "kernel and not slow" --device emulated --shard $*/4

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Times and memory beside other providers, and their plots.
bench: $(INSTALLED)
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=$(OUT)/bench.json $(ARGS)
	$(BIN)/python -m bench.plot $(OUT)/bench.json --output $(OUT)/plots

# What the compiler makes of every configuration, on every target, against what is committed.
audit: $(AUDITS)

$(AUDITS): audit-%: $(INSTALLED)
	$(BIN)/python -m bench.audit --targets $* --output build/audit/$*.json
	$(BIN)/python -m bench.compare bench/history/audit/$*.json build/audit/$*.json --plot build/audit/$*.png

# The full product of cases: hours.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m audit
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m slow

# All that needs a GPU, with whatever torch and Triton PYTHON has; what it finds goes into OUT as it is found.
gpu: gpu-needs
	failed=0; for part in gpu-test gpu-bench gpu-compile; do $(MAKE) $$part || failed=1; done; exit $$failed

gpu-needs:
	$(PYTHON) -c "import matplotlib, pytest, pytest_benchmark, torch, triton, daam; assert torch.cuda.is_available(), 'no GPU'"

gpu-test:
	mkdir -p $(OUT)
	$(MAKE) --jobs=8 --keep-going $(addprefix gpu-test-,$(SHARDS))

gpu-test-%:
	timeout 470 $(PYTHON) -m pytest -v -m "kernel and not slow" --device cuda --shard $*/8 > $(OUT)/gpu-test-$*.log 2>&1 \
		|| (grep -E "^(FAILED|ERROR)|^E  " $(OUT)/gpu-test-$*.log; exit 1)

gpu-bench:
	mkdir -p $(OUT)
	rm -f $(OUT)/bench.jsonl
	failed=0; timeout 440 $(PYTHON) -m pytest bench --benchmark-only -rs --deadline 380 --cases $(OUT)/bench.jsonl \
		--benchmark-json=$(OUT)/bench.json > $(OUT)/gpu-bench.log 2>&1 || failed=1; tail -50 $(OUT)/gpu-bench.log; \
		timeout 30 $(PYTHON) -m bench.plot $(OUT)/bench.jsonl --output $(OUT)/plots; exit $$failed

gpu-compile:
	mkdir -p $(OUT)
	timeout 470 $(PYTHON) -m pytest -v -m gpu --device cuda 2>&1 | tee $(OUT)/gpu-compile.log

clean:
	rm -rf .venv demo-output results build

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
