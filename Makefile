# `make demo` and `make test` need nothing but Python 3.11 to 3.13 and access to PyPI.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# What is imported is compiled then: a fraction of TensorFlow and JAX.
INSTALL = -m pip install --quiet --no-compile

.PHONY: demo test test-export lint lowest clean

demo: $(VENV)/.demo
	$(BIN)/python launch/main.py --config=configs/demo.py --workdir=runs/demo

# What the one environment compiled the other finds: they train the same small network. The larger
# suite is first: there the other workers do not wait meanwhile.
test test-export: export JAX_COMPILATION_CACHE_DIR = $(abspath $(VENV))/compiled

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist loadfile --no-loadscope-reorder
	$(MAKE) test-export

# The packages of the extra "export" want older versions of others than the suite runs with; Ray is
# large.
test-export: $(VENV)-export/.dev
	$(VENV)-export/bin/python -m pytest -n 2 --dist worksteal tests/test_ray_data.py \
		tests/test_export_formats.py -k "onnx or openvino or workers"

lint: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The quick tests with the lowest versions that setup.py allows.
lowest: $(VENV)-lowest/.done
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

$(VENV)-lowest/.done: setup.py
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python $(INSTALL) uv
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest/bin/python \
		--resolution lowest-direct -e ".[demo,dev]"
	touch $@

$(VENV)/.demo: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --upgrade pip
	$(BIN)/python $(INSTALL) -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python $(INSTALL) -e ".[demo,dev]"
	touch $@

$(VENV)-export/.dev: setup.py
	$(PYTHON) -m venv $(VENV)-export
	$(VENV)-export/bin/python $(INSTALL) --upgrade pip
	$(VENV)-export/bin/python $(INSTALL) -e ".[demo,dev,export,ray]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-export $(VENV)-lowest runs
