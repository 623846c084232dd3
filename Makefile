# Every target sets up what it needs; the virtual environment is rebuilt when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
VENV4 := .venv4
PARALLEL := --numprocesses 2 --dist loadfile # tiny models: a thread each, two at a time
TESTS4 := $(patsubst %,tests/capture/%.py,routers/test_blocks4 test_devices test_patch \
	test_recorder test_session tokens/test_generation tokens/test_identity tokens/test_loss)

.PHONY: demo test test-transformers4 lint clean

demo: $(READY)
	$(VENV)/bin/bhlog demo

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest $(PARALLEL)

test-transformers4: $(VENV4)/.ready
	OMP_NUM_THREADS=1 $(VENV4)/bin/pytest $(PARALLEL) $(TESTS4)

lint: $(READY)
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet "torch==2.13.0"
	$(VENV)/bin/pip install --quiet --editable ".[dev]" --config-settings editable_mode=strict
	touch $@

$(VENV4)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/pip install --quiet --upgrade pip
	$(VENV4)/bin/pip install --quiet "torch==2.13.0"
	$(VENV4)/bin/pip install --quiet --editable ".[transformers4]" --config-settings editable_mode=strict
	touch $@

clean:
	rm -rf $(VENV) $(VENV4)
