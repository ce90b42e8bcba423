# Each target sets up what it needs: a virtual environment in .venv, installed under constraints.txt.
PYTHON ?= python3
OUT ?= results
BIN := .venv/bin
INSTALLED := .venv/installed
SHELL := bash
.SHELLFLAGS := -o pipefail -c

AUDITS := audit-sm_80 audit-sm_90 audit-sm_100 audit-gfx942

.PHONY: demo examples test test-daam test-others test-emulated test-emulated-sample margins lint bench audit audit-model \
	test-long test-long-compiled test-long-interpreted numerics mutants matrix test-slow gpu gpu-dry gpu-prepare hub clean

demo: $(INSTALLED)
	$(BIN)/python -m daam.recipes.digits $(ARGS)

# Two processes at a time, of parts that fill both cores: interpreted kernels cannot be compiled ahead of time.
# Threads that wait must not spin: the other process needs their core.
test: export OMP_WAIT_POLICY := passive
test: lint
	$(MAKE) --jobs=2 --output-sync=target test-daam test-others test-emulated-sample \
		$(addprefix test-interpreted-,0 1 2 3) && echo "make test: $$SECONDS s"

COMPILED := not kernel and not emulated and not audit and not long and not slow and not gpu
INTERPRETED := kernel and not long and not slow
EMULATED := emulated and not slow

test-daam: $(INSTALLED)
	$(BIN)/python -m pytest -q tests/daam -m "$(COMPILED)"

test-others: $(INSTALLED)
	$(BIN)/python -m pytest -q --ignore=tests/daam -m "$(COMPILED)"

test-interpreted-%: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "$(INTERPRETED)" --shard $*/4

# Shares of their bounds that errors take, under all that CPUs differ in: hours, or ARGS="--only avx2-1 tests/... -k ...".
margins: $(INSTALLED)
	$(BIN)/python tests/margins.py $(ARGS)

# Kernels as they are compiled for sm_90, emulated: a few small cases of every one, and wrong ones; needs gcc.
test-emulated-sample: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "$(EMULATED)" --device emulated

# The interpreter's cases, all of them, on both cores: most of an hour, since Triton compiles a thousand kernels.
test-emulated:
	$(MAKE) --jobs=2 --output-sync=target $(addprefix test-emulated-,0 1 2 3)

test-emulated-%: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "$(INTERPRETED)" --device emulated --shard $*/4

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Methods compared on real data out of packages, half an hour of two cores: results go into build/examples,
# and with ARGS="--keep bench/history/examples" to the committed ones.
examples: export OMP_NUM_THREADS := 1
examples: $(INSTALLED)
	$(MAKE) --jobs=2 --output-sync=target $(addprefix examples-,text vision speech)

examples-%: $(INSTALLED)
	$(BIN)/python -m bench.examples $* $(ARGS)

# A package for Hugging Face's kernel hub, of this one's functions and kernels: into build/hub, or OUT=….
hub: OUT = build/hub
hub: $(INSTALLED)
	$(BIN)/python -m daam.hub $(OUT)

# Times and memory beside other providers, and their plots.
bench: $(INSTALLED)
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=$(OUT)/bench.json $(ARGS)
	$(BIN)/python -m bench.plot $(OUT)/bench.json --output $(OUT)/plots

# What the compiler makes of every configuration, on every target, and the performance model of what was measured,
# against what is committed.
audit: $(AUDITS) audit-model

$(AUDITS): audit-%: $(INSTALLED)
	$(BIN)/python -m bench.audit --targets $* --output build/audit/$*.json
	$(BIN)/python -m bench.compare bench/history/audit/$*.json build/audit/$*.json --plot build/audit/$*.png

audit-model: $(INSTALLED)
	$(BIN)/python -m bench.validate --output build/audit/model.json
	diff bench/history/model.json build/audit/model.json

# The rest of what `make test` has a quick part of, one after another: hours, of which each says how many seconds it took.
test-long: test-long-compiled test-long-interpreted numerics mutants matrix

# More examples, larger memory, more iterations.
test-long-compiled: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "long and not kernel" && echo "make $@: $$SECONDS s"

test-long-interpreted: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "long and kernel" && echo "make $@: $$SECONDS s"

# Errors of every provider over means, spreads, lengths, c and Gaussians, and what is claimed of them.
numerics: $(INSTALLED)
	$(BIN)/python -m bench.numerics $(ARGS) && echo "make $@: $$SECONDS s"

# Slips in kernels, reference and host code, each of which a test of `make test` must notice.
mutants: $(INSTALLED)
	$(BIN)/python tests/mutation.py $(ARGS) && echo "make $@: $$SECONDS s"

# The tests on the oldest pair of torch and Triton, the pinned one and the newest that pip finds.
matrix:
	$(PYTHON) tests/matrix.py $(ARGS) && echo "make $@: $$SECONDS s"

# The full product of cases: hours.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "audit or slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m slow
	$(BIN)/python -m pytest -q -m "emulated and slow" --device emulated

# All that needs a GPU, in twelve minutes of one (11.8 expected, 13.0 at most, machine starts included), with whatever
# torch and Triton PYTHON has; what it finds goes into OUT as it is found. `$(PYTHON) -m bench.device first` and `second`
# are its halves, where there is no make.
gpu:
	@$(PYTHON) -m bench.device first second --out $(OUT)

# The same without one: the plan, all its kernels compiled for sm_90, and cases of every regime emulated.
gpu-dry: $(INSTALLED)
	$(BIN)/python -m bench.device first second --dry

# Beforehand, with the Python, torch and Triton of the GPU's machine: kernels to take along, into .gpu/.
gpu-prepare:
	$(PYTHON) -m bench.device.prepare

clean:
	rm -rf .venv .gpu demo-output results build

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	touch $@
