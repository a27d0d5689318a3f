# `make demo` and `make test` need Python >= 3.10 with its venv module, and set up .venv first. Linux and macOS.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
READY_ALL := $(VENV)/ready-all

# Builds of PyTorch, the first of which that installs is taken. Without a GPU: the CPU build from where pip looks, the
# same from PyTorch's own index, and the build for CUDA. To choose one: make setup TORCH=torch==2.11.0
GPU := $(shell nvidia-smi -L 2>/dev/null | grep '^GPU')
ifdef TORCH
BUILDS := '$(TORCH)'
else ifeq ($(shell uname -s)$(GPU),Linux)
CPU := torch==2.13.0+cpu
BUILDS := '$(CPU)' '$(CPU) --extra-index-url=https://download.pytorch.org/whl/cpu' 'torch==2.13.0'
else
BUILDS := 'torch==2.13.0'
endif

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# The demo trains as two ranks where there are two cores: its network is too small for threads to share the work.
RANKS := $(if $(GPU),1,$(shell [ "$$(getconf _NPROCESSORS_ONLN)" -ge 2 ] && echo 2 || echo 1))
TRAIN := $(if $(filter 2,$(RANKS)),OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2,python) train.py

.PHONY: setup setup-all demo gpu-check test test-all resolve lint format clean

# `make setup` installs no optional package, `make setup-all` every one that the tests can use.
setup: $(READY)
setup-all: $(READY_ALL)
$(READY): EXTRAS := demo,report,dev
$(READY_ALL): EXTRAS := demo,report,dev,dino,latents,tensorboard,parquet,oracles,study

$(READY) $(READY_ALL): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@trap 'rm -rf $(VENV); exit 1' INT TERM; for build in $(BUILDS); do \
		case $$build in *+cpu*) cuda=;; *) cuda=' (on Linux it brings gigabytes of CUDA packages)';; esac; \
		echo "Installing $$build$$cuda and what constraints.txt lists"; \
		$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt $$build '.[$(EXTRAS)]' \
			&& touch $(READY) $@ && exit 0; \
	done; rm -rf $(VENV); echo 'Nothing could be installed; pip says why. README.md has the plain pip commands.'; exit 1

# The main job, command by command as in the README.
demo: setup
	@echo 'Training takes three minutes on two cores of 2024, five on old ones, twice that on one; the five other steps one.'
	python dataset_tool.py convert --source=digits --dest=demo/digits.zip --overwrite
	$(TRAIN) --preset=edm2plus-digits --data=demo/digits.zip --outdir=demo/run
	python reconstruct_phema.py --indir=demo/run --outstd=0.120
	python generate.py --net=demo/run/phema-0000049-0.120.safetensors --seeds=0-99 --class=0-9 --outdir=demo/samples
	python calculate_metrics.py gen --net=demo/run/phema-0000049-0.120.safetensors --ref=demo/digits.zip \
		--metrics=fd_pixels,class_agreement --seeds=0-999 --json=demo/metrics.json --record=demo/metrics.jsonl
	python report.py demo/run --samples=demo/samples --metrics=demo/metrics.json --dest=demo/report.html
	@echo
	@echo 'All of it on one page:                 demo/report.html'
	@echo 'Generated digits, a class per column:  demo/samples-grid.png'
	@echo 'Loss over training time:               demo/run/loss.png'
	@echo 'Samples during training:               demo/run/samples-*.png'
	@echo 'Metrics:                               demo/metrics.json'

# What a new machine with a GPU computes, and how fast: one page, gpu-check.md. DEVICE=cpu checks a CPU (an hour).
gpu-check: setup
	python -m benchmarks.gpu_check $(if $(DEVICE),--device=$(DEVICE))

# Three on two cores: tests wait for processes that they start.
WORKERS := -n 3 --dist worksteal

test: setup lint
	python -m pytest $(WORKERS) -m 'not slow'

test-all: setup-all lint
	ALL_PACKAGES=1 python -m pytest $(WORKERS)

# Asks the package index whether every supported Python can install constraints.txt.
resolve: setup
	python -m pip install --quiet --upgrade pip  # old ones hold wheels against the Python that runs pip
	python -m tests.resolve_constraints

lint: setup
	ruff check .
	ruff format --check .
	mypy

format: setup
	ruff check --fix .
	ruff format .

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .hypothesis
