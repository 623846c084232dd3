# Every target sets up the environment that it needs: made anew when pyproject.toml changes, linked
# anew when files come or go.
PYTHON ?= python3
TORCH := $(shell sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml | head -n 1)
ENVIRONMENTS := .venv .venv-demo .venv-offline .venv4
STRICT := --config-settings editable_mode=strict # type checkers follow links, no import hooks
PYTEST := -m pytest --numprocesses 2 --dist loadfile # tiny models: a thread each, two at a time
TESTS4 := $(patsubst %,tests/capture/%.py,routers/test_blocks4 test_copies test_devices \
	test_kinds test_patch test_processes test_recorder test_session tokens/test_filler \
	tokens/test_generation tokens/test_identity tokens/test_loss)

OFFLINE := tests/capture/contract tests/analysis/commands tests/analysis/exports \
	tests/analysis/engines tests/analysis/report tests/analysis/test_*.py tests/test_*.py

.PHONY: demo test test-slow test-offline test-transformers4 fuzz lint clean FORCE

demo: .venv-demo/.linked
	.venv-demo/bin/bhlog demo

test: .venv/.linked
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST) -m "not slow"

test-slow: .venv/.linked
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST) -m slow

test-offline: .venv-offline/.linked
	OMP_NUM_THREADS=1 .venv-offline/bin/python $(PYTEST) -m "not slow" $(OFFLINE)

test-transformers4: .venv4/.linked
	OMP_NUM_THREADS=1 .venv4/bin/python $(PYTEST) $(TESTS4)

MUTANTS ?= 1000 # of each format
fuzz: .venv/.linked
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.fuzz --mutants $(MUTANTS)

lint: .venv/.linked
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy

.venv/.ready: EXTRA := dev
.venv-demo/.ready: EXTRA := capture,report
.venv-offline/.ready: EXTRA := test
.venv-offline/.ready: TORCH :=
.venv4/.ready: EXTRA := transformers4
QUIET := --quiet
.venv-demo/.ready: QUIET := # a first use: pip shows what it fetches

$(ENVIRONMENTS:%=%/.ready): %/.ready: pyproject.toml | build/files
	@echo "$*: installing bhlog[$(EXTRA)], some minutes the first time"
	@$(PYTHON) -m venv $*
	@$*/bin/pip install --quiet --upgrade pip "setuptools>=77"
	@$(if $(TORCH),$(install_torch))
	@$*/bin/pip install $(QUIET) --editable ".[$(EXTRA)]" $(STRICT)
	@touch $@

# The build of torch without a GPU is a tenth of the usual one; not every registry has it.
install_torch = nvidia-smi >/dev/null 2>&1 || $*/bin/pip install $(QUIET) "$(TORCH)+cpu" 2>/dev/null \
	|| $*/bin/pip install $(QUIET) "$(TORCH)"

$(ENVIRONMENTS:%=%/.linked): %/.linked: %/.ready build/files
	@echo "$*: linking"
	@$*/bin/pip install --quiet --no-deps --no-build-isolation --editable . $(STRICT)
	@touch $@

build/files: FORCE
	@mkdir -p build
	@find analysis capture sql -type f ! -path '*/__pycache__/*' ! -path '*.egg-info/*' | sort > $@.now
	@cmp -s $@.now $@ || cp $@.now $@

clean:
	rm -rf build $(ENVIRONMENTS)
