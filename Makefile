# `make demo` and `make test` need Python >= 3.10 and nothing else; both set up .venv first.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready

# Without a GPU, only the CPU build of PyTorch is accepted (on Linux it has a version of its own), never the CUDA
# packages. Override to choose another: make demo TORCH=torch==2.11.0
GPU := $(shell nvidia-smi -L 2>/dev/null)
ifeq ($(shell uname -s)$(GPU),Linux)
TORCH ?= torch==2.13.0+cpu
else
TORCH ?= torch==2.13.0
endif

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# The demo's network is too small for threads to help: waiting for each other, two are slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-all lint format clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --constraint constraints.txt '$(TORCH)' '.[demo,dev]' || { \
		echo 'Could not install. If $(TORCH) was not found, tell pip where the CPU builds of PyTorch are'; \
		echo '(PIP_EXTRA_INDEX_URL, see the PyTorch install page), or choose a build: make setup TORCH=torch==VERSION'; \
		exit 1; }
	touch $(READY)

# The main job, command by command as in the README.
demo: setup
	python dataset_tool.py convert --source=digits --dest=demo/digits.zip --overwrite
	python train.py --preset=edm2plus-digits --data=demo/digits.zip --outdir=demo/run
	python reconstruct_phema.py --indir=demo/run --outstd=0.120
	python generate.py --net=demo/run/phema-0000049-0.120.safetensors --seeds=0-99 --class=0-9 --outdir=demo/samples
	python calculate_metrics.py gen --net=demo/run/phema-0000049-0.120.safetensors --ref=demo/digits.zip \
		--metrics=fd_pixels,class_agreement --seeds=0-999 --json=demo/metrics.json --log=demo/metrics.jsonl
	@echo
	@echo 'Generated digits, a class per column:  demo/samples-grid.png'
	@echo 'Loss over training time:               demo/run/loss.png'
	@echo 'Samples during training:               demo/run/samples-*.png'
	@echo 'Metrics:                               demo/metrics.json'

test: setup lint
	python -m pytest -n 2 -m 'not slow'

test-all: setup lint
	python -m pytest -n 2

lint: setup
	ruff check .
	ruff format --check .

format: setup
	ruff check --fix .
	ruff format .

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .hypothesis
