# `make demo` and `make test` do everything from a fresh clone: environment, install, job.

PYTHON ?= python3.11
VENV ?= .venv
RUN = $(VENV)/bin/python
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help install demo test shapes shapes-results shapes-bases pictures space space-folder ship quality style fuzz conformance clean

help:  ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps "$$(grep ^lmms-eval== constraints.txt)"
	touch $@

install: $(VENV)/installed  ## virtual environment with the pinned versions

demo: install  ## ask the small model three questions of its video, in a process without this package
	$(RUN) examples/demo.py

test: install  ## the tests, on CPU
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile

shapes: install  ## train a small model from nothing on generated videos, into build/shapes/model
	$(RUN) -m linvt_hf.shapes data build/shapes/data
	$(RUN) -m linvt_hf.shapes image-llm build/shapes/image-llm
	rm -rf build/shapes/stage1 build/shapes/stage2 build/shapes/model
	$(VENV)/bin/linvt train shapes/stage1
	$(VENV)/bin/linvt train shapes/stage2
	$(VENV)/bin/linvt merge build/shapes/stage2 build/shapes/model

shapes-results: install  ## train and compare LinVT and simpler ways from three seeds, for many hours; print the tables
	test -e build/shapes/data/video-train.jsonl || $(RUN) -m linvt_hf.shapes data build/shapes/data
	$(RUN) -m linvt_hf.shapes results benchmarks/shapes model=examples/shapes-image-llm

shapes-bases: install  ## train each of the six image-LLMs small, and compare a few ways on each, for many hours
	test -e build/shapes/data/video-train.jsonl || $(RUN) -m linvt_hf.shapes data build/shapes/data
	$(RUN) -m linvt_hf.shapes bases benchmarks/shapes-bases

pictures: install  ## remake docs/pictures: what the small model's answers were read from, if that is true, and the page
	$(VENV)/bin/linvt explain examples/linvt-shapes examples/linvt-shapes/example.mp4 \
		"What shape flashes up?" "Which way does the yellow cross move?" --out docs/pictures
	$(RUN) -m linvt_hf.explain.faithfulness examples/linvt-shapes \
		--json benchmarks/faithfulness.json --figure docs/pictures/faithfulness.png
	LINVT_SCREENSHOT=docs/pictures/page.png $(RUN) -m pytest modeling_tests/test_space.py -k see_and_ask_again

space: install  ## a page in the browser: ask the small model about videos, see what its answers were read from
	$(RUN) examples/space/app.py

SPACE ?= build/space
space-folder:  ## that page as a Hub Space, complete, in build/space
	rm -rf $(SPACE) && mkdir -p $(SPACE)
	cp examples/space/* $(SPACE) && cp -r src/linvt_hf $(SPACE)/linvt_hf && cp -r examples/linvt-shapes $(SPACE)
	find $(SPACE) -name __pycache__ -prune -exec rm -r {} +

ship: install  ## examples/linvt-shapes with the code as it is now; MODEL=build/shapes/model puts that model there
	$(RUN) -m linvt_hf.shapes ship examples/linvt-shapes $(if $(MODEL),--model $(MODEL))

fuzz: install  ## read 5,000 broken video files
	$(RUN) modeling_tests/fuzz_video.py --files 5000

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
