# make demo   set up a virtual environment and explain three tweets (no network beyond the package index)
# make test   set up and run all tests, the slow ones and the notebooks too
# make fast   set up and run the tests but the slow ones and those that start processes (two minutes)
# make coverage-suite   influence through every architecture of transformers; writes docs/coverage.md (some minutes)
# make docs   build the documentation as a site: site/index.html (its search needs: python -m http.server --directory site)
# make oldest    set up the oldest supported versions beside it, and run the tests that ask the most of transformers
# make quality   check lint, formatting, what each wing imports, and types
# make style     mend lint and formatting

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test fast coverage-suite docs oldest quality style clean

demo: $(VENV)/.demo
	$(BIN)/msif demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

fast: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "not slow and not launch"

coverage-suite: $(VENV)/.test
	$(BIN)/python benchmarks/coverage/run.py

docs: $(VENV)/.test
	@# without an announcement of the theme's makers that is no warning of ours
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[test]"
	$(VENV)-oldest/bin/python -m pytest -m "not slow and not launch" tests/adapters tests/objectives tests/training tests/project/test_run.py

quality: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

style: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-oldest runs site

# One stamp per set of extras remembers what is installed; it is renewed when the metadata changes.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hf_msif and what it needs into $(VENV) (a few minutes the first time)"
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hf_msif with what tests and checks need into $(VENV) (a few minutes the first time)"
	$(PIP) --constraint constraints.txt --editable ".[quality, test]"
	@touch $@
