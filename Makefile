# Needs GNU make, bash and Python 3.11 or newer with pip and venv. Everything else goes into .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint clean install

PYTHON ?= python3.11 python3
BIN := .venv/bin

# Settings of the caller's own Python work must not reach into .venv.
unexport PYTHONPATH PYTHONHOME PYTHONWARNINGS MYPYPATH PIP_USER PIP_TARGET PIP_PREFIX

help:
	@echo 'make demo    install what is missing, then simulate and really train with every strategy'
	@echo 'make test    install what is missing, then ruff, mypy and pytest'
	@echo 'make lint    ruff and mypy alone'
	@echo 'make clean   remove .venv and everything built or cached; run records stay'
	@echo 'PYTHON=/path/to/python chooses the interpreter that .venv is made with (3.11 or newer)'

demo: install
	@$(BIN)/python tools/demo.py

test: lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

# Always asked, instant when there is nothing to do: tools/install.py keeps a stamp in .venv.
install: $(BIN)/python
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null; then rm -rf .venv; $(MAKE) --no-print-directory $(BIN)/python; fi
	@$(BIN)/python tools/install.py

$(BIN)/python:
	@found=; tried=; \
	for candidate in $(PYTHON); do \
	  if version=$$("$$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))' 2>/dev/null); \
	  then found=$$candidate; break; fi; \
	  tried="$$tried $$candidate ($${version:-does not run})"; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "distsim needs Python 3.11 or newer; tried:$$tried. Say where one is: make PYTHON=/path/to/python3.11 ..." >&2; \
	  exit 1; \
	fi; \
	echo "Making .venv with $$found ($$version)"; \
	"$$found" -m venv --clear .venv || { \
	  rm -rf .venv; \
	  echo "$$found could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; \
	}

clean:
	rm -rf .venv build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
