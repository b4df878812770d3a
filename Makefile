# Each target does its own set-up. Needed: Python 3.11, a C++ compiler, make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# Compiling 30,000 files takes two minutes; Python compiles those that it imports.
export PIP_NO_COMPILE := 1
# Where that is forbidden, as in many containers, each process would compile all of torch again.
unexport PYTHONDONTWRITEBYTECODE

# Files that say when, and in how many seconds, the environment was installed.
INSTALLED := .venv/.installed
TRAINING := .venv/.installed-train

# Beside the engines; .ci/run adds "train", so that pip solves for all of them once.
EXTRAS ?= export,dev

# Apart, and last: a dependency of litert-converter asks for an old typing-extensions, sigstore for a
# new one. Both work with the new one, but pip cannot choose it for both at once, and says so.
WITH_RELEASE := $(PY) -m pip install --quiet -e ".[release]" 2>.venv/pip-release.log || \
	{ cat .venv/pip-release.log >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-slow qnn qnn-litert bench critter lint docs clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@echo "Handheld. Targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r a b; do printf '%-18s %s\n' "$$a" "$$b"; done

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 is missing" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: make PYTHON=..." >&2; exit 2; }
	@test -x $(PY) || "$(PYTHON)" -m venv .venv
	@echo "Installing torch, the engines and handheld into .venv (some minutes, 3 GB)"
	@start=$$(date +%s) && $(PY) -m pip install --quiet torch==2.13.0 -e ".[$(EXTRAS)]" && \
		{ $(WITH_RELEASE); } && \
		echo $$(($$(date +%s) - start)) > $@ && echo "Installed in $$(cat $@) s"

$(TRAINING): $(INSTALLED)
	@$(PY) -c "import robohash, tensorboard" 2>/dev/null || \
		{ $(PY) -m pip install --quiet -e ".[train]" && { $(WITH_RELEASE); }; } && touch $@

demo: $(INSTALLED)  ## Export critter, draw with it, measure it (10 minutes on 2 cores)
	@$(PY) benchmarks/demo.py

# Each file goes whole to one process: its fixtures are expensive. tests/conftest.py orders them.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)  ## The fast tests
	@$(PY) -m pytest $(PARALLEL) --durations 30 -m "not slow and not system"

# Tests on ExecuTorch's QNN take minutes more, and run where `make qnn` was called before.
qnn-litert: $(INSTALLED)
	@$(PY) -m handheld qnn install --for litert || echo "No QNN: its tests are skipped"

qnn: qnn-litert  ## Qualcomm's QNN libraries, for all tests that run its simulation
	@$(PY) -m handheld qnn install --for executorch

test-all: $(INSTALLED) $(TRAINING) qnn-litert  ## All tests; those whose system package is missing are skipped
	@$(PY) -m pytest $(PARALLEL) -rs --durations 30

test-slow: $(INSTALLED) $(TRAINING) qnn-litert  ## The tests that `make test` leaves out
	@$(PY) -m pytest $(PARALLEL) -rs --durations 30 -m "slow or system"

bench: $(INSTALLED)  ## Every precision on every target, more iterations; records in build/bench
	@$(PY) benchmarks/matrix.py

critter: $(INSTALLED) $(TRAINING)  ## Train critter again, in hours; goes on where it was stopped
	@$(PY) -m handheld_export.critter all

lint: $(INSTALLED)  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy runtime export benchmarks

docs: $(INSTALLED)  ## Write generated pages again, and check all of them
	@$(PY) docs/generate.py
	@$(PY) -m pytest tests/test_docs.py

clean:  ## Remove what the targets above have made, but .venv and critter's training
	@rm -rf build/demo build/bench build/harness dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find runtime export tests benchmarks docs -name __pycache__ -type d -exec rm -rf {} +
