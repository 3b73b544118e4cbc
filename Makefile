# make demo    the main job on this machine: play, train, evaluate; about 6 minutes on 2 cores, installation aside
# make test    lint, types, tests: the fast set
# make ci      the tests that take tens of seconds each: compilers, meshes, runs that are killed
# make slow    the slow set: several processes, kills, whole runs; about an hour
# make lint    lint and types only
# PYTHON=python3.12 takes another interpreter, with a virtual environment of its own; ARGS=... goes
# to demo, ci or slow: ARGS=--config.seed=1.
PYTHON ?= python3
WORKDIR ?= runs/tiny
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

.PHONY: demo test ci slow lint clean

demo: $(VENV)/run.stamp
	$(BIN)/python -m ssp_jax.main --config=configs/tiny.py --workdir=$(WORKDIR) $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist=worksteal

ci: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto --dist=worksteal -m "ci and not slow" $(ARGS)

slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

# A changed requirements file makes the environment again; a failed installation leaves no stamp.
$(VENV)/run.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; ssp_jax needs 3.11: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .venv-* runs
