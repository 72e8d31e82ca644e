# make reproduce   the published comparison, and the fair one, on this machine
# make steps       the same, step by step, six notebooks
# make lint        formatting, imports, stripped notebooks
# make quick       that, and the tests that need no server (2 to 3 min on two cores)
# make test        the same with servers, notebooks and a browser (10 to 12 min on two cores)
# make nightly     the same with long repetitions, more real servers, and the soak
# make lab         JupyterLab at the front notebook
# make bench       the load generator beside other clients, the fast scheduler beside vLLM's
# make bench-servers   it and another client at servers that others wrote (the first time builds llama.cpp)
# make soak        20 starts, loads and stops in a row: does anything grow? (at most 30 min)
# make front       the front notebook's outputs and README's figure anew, from recorded runs
# make bundle      the gpu environment for a host without network, in parts (env/bundle/README.md)
# make env         only prepare the environment
# make clean       remove the environments
# make calibrator  llmcompressor beside it, for recipes that a text calibrates (`fp8lab quantize --recipe int4-by-gptq`)
#
# ENV=cpu|gpu overrides the choice of environment (default: gpu where an NVIDIA GPU is visible).
# PYTHON=...  the interpreter to build on: 3.11 or later for cpu, 3.12 for gpu.

ENV ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PYTHON ?= python3
VENV := .venv/$(ENV)
STAMP := $(VENV)/.ready
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help env calibrator reproduce steps quick test nightly lab lint bench bench-servers soak bundle front clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

env: $(STAMP)

$(STAMP): env/$(ENV).txt env/extra.txt env/lab-settings.json env/setup.sh pyproject.toml
	PYTHON="$(PYTHON)" bash env/setup.sh "$(ENV)" "$(VENV)"
	@touch $@

# It sees the main environment's packages (torch among them), and holds what it wants in other versions.
calibrator: .venv/calibrator/.ready

.venv/calibrator/.ready: env/calibrator.txt $(STAMP)
	$(BIN)/python -m venv --clear .venv/calibrator
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv/calibrator/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	.venv/calibrator/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r env/calibrator.txt
	@touch $@

reproduce: $(STAMP)
	$(BIN)/fp8lab reproduce $(ARGS)

steps: $(STAMP)
	$(BIN)/fp8lab reproduce --notebook steps $(ARGS)

# In a container one is root, and Jupyter then wants to be told so.
lab: $(STAMP)
	$(BIN)/jupyter lab project_reproduce.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb

PYTEST := $(BIN)/python -m pytest --durations 10

# So many files at a time, in the order of tests/conftest.py: what the tests of a file share is made once. More than there are
# cores, since tests wait too.
BESIDE = $(PYTEST) -n $(1) --dist loadfile --no-loadscope-reorder

quick: lint
	$(call BESIDE,3) -m "not servers and not timing" $(ARGS)

# What fails beside another test (pytest's exit code 1), since a server fills a core or since it times itself, is run once
# more, alone.
AGAIN = $(call BESIDE,$(2)) -m $(1) $(ARGS) || { [ $$? = 1 ] && $(PYTEST) --last-failed --last-failed-no-failures none -m $(1) $(ARGS); }

test: quick
	$(call AGAIN,"servers and not timing",3)
	$(call AGAIN,timing,4)

nightly: export FP8LAB_NIGHTLY = 1
nightly: test
	$(MAKE) soak

bench: $(STAMP)
	$(BIN)/python tests/bench/bench_client.py $(ARGS)
	$(BIN)/python tests/bench/bench_scheduler.py

bench-servers: $(STAMP)
	$(BIN)/python tests/bench/bench_servers.py $(ARGS)

soak: $(STAMP)
	$(BIN)/python tests/bench/soak.py $(ARGS)

# COMPILE_CACHE=... packs a vLLM compile cache along.
bundle:
	PYTHON="$(PYTHON)" bash env/bundle/build.sh bundle $(COMPILE_CACHE)

# The front notebook is committed with the outputs of a recorded run, README with a figure of three and a picture of the page.
front: $(STAMP)
	$(BIN)/python data/front.py

clean:
	rm -rf .venv
