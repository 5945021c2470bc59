# `make demo` and `make test` do everything from a fresh clone: environment, install, job.

PYTHON ?= python3.11
VENV ?= .venv
RUN = $(VENV)/bin/python
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help install demo test quality style conformance clean

help:  ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

install: $(VENV)/installed  ## virtual environment with the pinned versions

demo: install  ## write a short video, make a model folder, ask it a question in a process without this package
	$(RUN) examples/demo.py

test: install  ## the tests, on CPU
	$(RUN) -m pytest

conformance: install  ## the test suite that transformers ships in its source distribution, against our classes
	$(RUN) modeling_tests/conformance/run.py

quality: install  ## style checks
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

style: install  ## fix what the style checks can fix
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
