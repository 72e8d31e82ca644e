# make reproduce   the published comparison, and the fair one, on this machine
# make test        formatting, linting, unit tests, real servers, notebooks
# make lab         JupyterLab at the front notebook
# make bench       the load generator beside other clients
# make soak        20 starts, loads and stops in a row: does anything grow? (at most 30 min)
# make bundle      the gpu environment for a host without network, in parts (env/bundle/README.md)
# make env         only prepare the environment
#
# ENV=cpu|gpu overrides the choice of environment (default: gpu where an NVIDIA GPU is visible).
# PYTHON=...  the interpreter to build on: 3.11 or later for cpu, 3.12 for gpu.

ENV ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PYTHON ?= python3
VENV := .venv/$(ENV)
STAMP := $(VENV)/.ready
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help env reproduce steps test lab lint bench soak bundle front clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 11

env: $(STAMP)

$(STAMP): env/$(ENV).txt env/extra.txt env/lab-settings.json env/setup.sh pyproject.toml
	PYTHON="$(PYTHON)" bash env/setup.sh "$(ENV)" "$(VENV)"
	@touch $@

reproduce: $(STAMP)
	$(BIN)/fp8lab reproduce $(ARGS)

steps: $(STAMP)
	$(BIN)/fp8lab reproduce --notebook steps $(ARGS)

lab: $(STAMP)
	$(BIN)/jupyter lab project_reproduce.ipynb $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb

test: lint
	$(BIN)/python -m pytest $(ARGS)

bench: $(STAMP)
	$(BIN)/python tests/bench/bench_client.py $(ARGS)

soak: $(STAMP)
	$(BIN)/python tests/bench/soak.py $(ARGS)

# COMPILE_CACHE=... packs a vLLM compile cache along.
bundle:
	PYTHON="$(PYTHON)" bash env/bundle/build.sh bundle $(COMPILE_CACHE)

# The front notebook is committed with the outputs of the recorded run, the README with a figure of four runs: made anew.
front: $(STAMP)
	$(BIN)/python -c "import fp8lab as lab; from fp8lab import paths; \
	  runs = [lab.open_run(source=name) for name in ('h100-80gb', 'h200-80gb', 'h100-80gb-starts', 'h100-80gb-long-prompts')]; \
	  lab.worth_figure(*runs).save(paths.DATA / 'recorded' / 'h100-80gb' / 'figures' / 'worth.svg')"
	$(BIN)/fp8lab reproduce --source h200-80gb
	$(BIN)/python -c "from fp8lab import paths; from fp8lab.report import notebooks; \
	  notebooks.keep_outputs(paths.RUNS / 'redrawn-h200-80gb' / notebooks.FRONT.name)"

clean:
	rm -rf .venv
