# Two commands do everything on a fresh machine: `make demo` and `make test`.
# PYTHON chooses the interpreter (3.11 or newer), VENV where its environment goes.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m

.PHONY: demo test lint install clean

demo: install
	$(RUN) tmu_dist.demo

test: install
	$(RUN) pytest -m "" --numprocesses 2

lint: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,radar,video]'
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[flow]' \
	    || echo "No optical flow: pysteps is built from source and needs a C compiler. Its tests are skipped."
	touch $@

clean:
	rm -rf $(VENV)
