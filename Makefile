# make demo          synthetic nodules, audit, training and the tutorial as an HTML page, in out/
# make demo DATA=DIR OUT=out    the same on a competition folder
.DEFAULT_GOAL := help
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out
DATA   ?=
STAMP  := $(VENV)/.installed
BENCH  := .venv-bench
SPACE  := $(subst ,, )
# nbdev's hooks look for their programs in PATH; these find them in VENV
HOOKS   = $(BIN)/nbdev_install_hooks >/dev/null 2>&1 && git config --file .gitconfig merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P" && \
          printf '\#!/bin/bash\n%s\n' '$(BIN)/nbdev_trust' > .git/hooks/post-merge

.PHONY: help install demo test bench lab export clean

help: ## list these targets
	@echo "m3dv: make TARGET"; echo
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

install: $(STAMP) ## make .venv with the tested set of packages, and git hooks for notebooks

$(STAMP): settings.ini setup.py constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -c 'import sys; m=next(l.split("=")[1].strip() for l in open("settings.ini") if l.startswith("min_python")); t=tuple(map(int,m.split("."))); sys.exit(0 if sys.version_info>=t else f"m3dv needs Python {m} or newer; $(PYTHON) is {sys.version.split()[0]}. Name another one: make PYTHON=python3.12")' && \
	  echo "Making $(VENV) …" && $(PYTHON) -m venv $(VENV); fi
	@echo "Installing the packages of constraints.txt into $(VENV): several minutes the first time, mostly downloads …"
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@if [ -d .git ] && command -v git >/dev/null; then $(HOOKS) || echo "The git hooks for notebooks could not be installed."; fi
	@touch $@
	@$(BIN)/python -c 'import platform; from importlib.metadata import version as v; print("m3dv %s is in $(VENV), with Python %s, torch %s and fastai %s." % (v("m3dv"), platform.python_version(), v("torch"), v("fastai")))'

demo: $(STAMP) ## audit, train and run the tutorial; DATA=DIR for your own folder, OUT=DIR for the results
	@$(BIN)/python tools/demo.py --out "$(OUT)" $(if $(DATA),--data "$(DATA)")

test: $(STAMP) ## check the project and run every notebook; ONLY="words" for what has one of them in its name
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist load --maxschedchunk 1 $(if $(ONLY),-k "$(subst $(SPACE), or ,$(strip $(ONLY)))")

bench: $(BENCH)/.installed ## measure beside MONAI and TorchIO, tables in results/; DATA=DIR, ONLY="parts" or QUICK=1
	@$(BENCH)/bin/python bench/speed.py $(ONLY) $(if $(DATA),--data "$(DATA)") $(if $(QUICK),--quick)

$(BENCH)/.installed: settings.ini setup.py constraints.txt bench/requirements.txt
	@[ -x $(BENCH)/bin/python ] || $(PYTHON) -m venv $(BENCH)
	@echo "Installing m3dv and its peers into $(BENCH): several minutes, mostly downloads …"
	@$(BENCH)/bin/python -m pip install -qq --upgrade pip
	@$(BENCH)/bin/python -m pip install -qq -c constraints.txt -r bench/requirements.txt -e .
	@touch $@

lab: $(STAMP) ## JupyterLab with the package and its kernel
	@JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab --notebook-dir=nbs

export: $(STAMP) ## after editing notebooks: clean them, write m3dv/*.py and README.md
	@$(BIN)/python tools/shrink.py
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export
	@$(BIN)/python tools/readme.py

clean: ## remove what these targets made, out/ excepted
	rm -rf $(VENV) $(BENCH) _proc _docs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
