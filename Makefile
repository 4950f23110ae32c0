# Every target alone makes .venv, installs what it needs (once), runs, and says what it does.
# Another interpreter: make PYTHON=python3.12 demo. Another environment: make VENV=.venv-other demo.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(shell test -t 2 || echo -q)
TESTS ?=
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo lab test docs refresh assets slow real clean checks python \
        check-export check-clean check-notebooks check-tests check-docs check-stale

help: ## list the targets
	@echo "make TARGET; each one installs what it needs into $(VENV) first (once, some minutes)"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' Makefile

# --- installation -----------------------------------------------------------------------------------------------

python: # the interpreter is new enough, and the one that was asked for
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is missing or older than 3.11; say which one to use, e.g. make PYTHON=python3.12 demo" >&2; exit 2; }
	@test "$(origin PYTHON)" = file || test ! -e $(BIN)/python || \
	  $(PYTHON) -c 'import subprocess, sys; v = subprocess.check_output([sys.argv[1], "-c", "import sys; print(sys.version_info[:2])"], text=True).strip(); v == str(sys.version_info[:2]) or sys.exit(f"$(VENV) was made with Python {v}; take another one, e.g. make VENV=.venv-new PYTHON=$(PYTHON) …, or remove it")' $(BIN)/python

$(BIN)/python: | python
	@df -Pk "$$(dirname $(VENV))" | awk 'NR == 2 && $$4 < 7000000 { printf "%.1f GB free, expected 7 for $(VENV) (PyTorch with its CUDA libraries); make room, or say VENV=DIR on another disk\n", $$4 / 1e6; exit 2 }' >&2
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.core: settings.ini setup.py pyproject.toml | python $(BIN)/python
	@echo "installing wsl_nb (once, some minutes)"
	@$(PIP) -e . && touch $@

$(VENV)/.lab: settings.ini setup.py pyproject.toml | python $(BIN)/python
	@echo "installing wsl_nb with JupyterLab (once, some minutes)"
	@$(PIP) -e ".[lab]" && touch $@ $(VENV)/.core

$(VENV)/.dev: settings.ini setup.py pyproject.toml | python $(BIN)/python
	@echo "installing wsl_nb with all that tests and docs need (once, some minutes)"
	@$(PIP) -e ".[dev]" && touch $@ $(VENV)/.core $(VENV)/.lab
	@$(BIN)/python -c 'import pydensecrf' 2>/dev/null || $(PIP) -e ".[crf]" >$(VENV)/crf.log 2>&1 || \
	  echo "the crf extra did not build (it needs a C++ compiler, see $(VENV)/crf.log): its tests are skipped, its parity rows not covered"

# --- for users --------------------------------------------------------------------------------------------------

demo: $(VENV)/.core ## train MoRe on the embedded data; table, pictures and report.html in out/demo (5 minutes)
	@echo "demo: MoRe on the embedded data, into out/demo"
	@$(BIN)/wsl-nb demo more --out out/demo --overwrite

lab: $(VENV)/.lab ## open the MoRe lesson in JupyterLab
	@echo "lab: JupyterLab with nbs/02_more.ipynb; Ctrl-C stops it"
	@$(BIN)/wsl-nb lab

# --- for developers ---------------------------------------------------------------------------------------------

test: $(VENV)/.dev ## all checks: export, notebooks, pytest, docs, stale outputs (25 minutes at most)
	@echo "test: export, clean notebooks, notebook cells, pytest, docs, stale outputs"
	@$(MAKE) --no-print-directory -k checks
	@echo "test: everything passed"

checks: check-export check-clean check-notebooks check-tests check-docs check-stale

check-export: $(VENV)/.dev
	@echo "--- wsl_nb is what the notebooks export"
	@$(BIN)/python tools/check_sync.py export
check-clean: $(VENV)/.dev
	@echo "--- notebooks carry no stray metadata"
	@$(BIN)/python tools/check_sync.py clean
check-notebooks: $(VENV)/.dev
	@echo "--- cells of all notebooks run"
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
check-tests: $(VENV)/.dev
	@echo "--- pytest"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(TESTS)
check-docs: $(VENV)/.dev
	@echo "--- docs build without a warning, README is up to date"
	@$(BIN)/python tools/build_docs.py --check
check-stale: $(VENV)/.dev
	@echo "--- committed outputs are not older than the code"
	@$(BIN)/python tools/run_notebooks.py --check

docs: $(VENV)/.dev ## make README.md and the site in _docs
	@echo "docs: README.md, and the site in _docs/index.html"
	@$(BIN)/python tools/build_docs.py

refresh: $(VENV)/.dev ## export, clean, and renew the outputs of stale notebooks, then the docs
	@echo "refresh: export, outputs of stale notebooks, clean, docs"
	@$(BIN)/nbdev_export && OMP_NUM_THREADS=1 $(BIN)/python tools/run_notebooks.py && $(BIN)/nbdev_clean && $(BIN)/python tools/build_docs.py

assets: $(VENV)/.core ## train the small models that are shipped in wsl_nb/assets
	@echo "assets: the shipped small models, from their seeds"
	@$(BIN)/wsl-nb assets make all

slow: $(VENV)/.dev ## the long tests: claims over three seeds, ten kills, slow cells
	@echo "slow: pytest -m slow, then the slow cells of the notebooks"
	@$(BIN)/python -m pytest -m "slow and not data" $(TESTS)
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing --flags slow

real: $(VENV)/.dev ## full width on the real files under WSL_NB_DATA; prints seconds and memory
	@test -d "$$WSL_NB_DATA" || { echo "real: set WSL_NB_DATA to the folder that holds the real data" >&2; exit 2; }
	@echo "real: full width on the files under WSL_NB_DATA"
	@$(BIN)/python -m pytest -s -m data tests/test_*real*.py $(TESTS)

clean: ## remove what docs, tests and builds left; keeps .venv and out
	@echo "clean: removing built pages and caches"
	@rm -rf _docs _proc jupyter_execute build dist .pytest_cache .hypothesis nbs/.ipynb_checkpoints nbs/.last_checked
	@find wsl_nb tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
