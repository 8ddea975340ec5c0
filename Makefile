# Needs make and Python 3.11 to 3.13; everything else is installed into .venv.
PYTHON ?= python3
# pinned: the versions of requirements.txt; newest: of JAX and everything else, the newest that this Python takes.
JAX ?= pinned
# What JAX is installed for beside the CPU: an NVIDIA GPU, where there is one. cuda12: of older drivers; tpu: a TPU.
DEVICE ?= $(if $(shell command -v nvidia-smi 2> /dev/null),cuda13)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := .venv/bin
INSTALLED := .venv/.installed-$(VERSION)-$(JAX)$(if $(DEVICE),-$(DEVICE))
LIBTPU := 0.0.51
TORCH := 2.13.0
MINUTES ?= 50
SEED ?= 0

.PHONY: quickstart test test-all mutants soak lint docs clean

quickstart: $(INSTALLED)
	$(BIN)/python -m experiments.quickstart --workdir=runs/quickstart

test: $(INSTALLED) .cache/libtpu .cache/transformers/.installed .cache/notebooks/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(INSTALLED) .cache/libtpu .cache/transformers/.installed .cache/notebooks/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or not slow"
	OPTIMISED=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m optimised

# One-line faults, each against the tests beside it; prints those that no test notices. Forty minutes on two cores.
mutants: $(INSTALLED) .cache/libtpu .cache/transformers/.installed .cache/notebooks/.installed
	$(BIN)/python -m tests.mutation.run

# Kills, signals, full disks, flipped bits and bad input, from a seed, for so many minutes.
soak: $(INSTALLED)
	$(BIN)/python -m tests.soak.run --minutes=$(MINUTES) --seed=$(SEED)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The manual as a site; a link that leads nowhere is an error.
docs: .cache/docs/.installed
	NO_MKDOCS_2_WARNING=1 .cache/docs/bin/mkdocs build --strict --quiet
	@echo ".cache/site/index.html"

clean:
	rm -rf .venv .cache

# A changed requirements.txt, or another PYTHON, makes a new environment.
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed, not %d.%d; choose one with PYTHON=" % sys.version_info[:2])'
	@case $(JAX) in pinned|newest) ;; *) echo "JAX=$(JAX): expected pinned or newest" >&2; exit 2;; esac
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(if $(filter pinned,$(JAX)),$(BIN)/pip install --quiet -r requirements.txt)
	$(if $(filter pinned,$(JAX)),$(BIN)/pip install --quiet --no-deps -e .,$(BIN)/pip install --quiet -e ".[dev]")
	$(if $(DEVICE),$(BIN)/pip install --quiet "jax[$(DEVICE)]==$$($(BIN)/python -c 'import jax; print(jax.__version__)')")
	@test -z "$(DEVICE)" || $(BIN)/python -c 'import jax; exit(jax.default_backend() == "cpu")' 2> /dev/null || \
	    echo "JAX finds no device with DEVICE=$(DEVICE), and runs on the CPU if at all; DEVICE=cuda12 is for older drivers"
	touch $@

# Compiles for TPUs that are not here; apart from .venv, where JAX would look for a TPU at every start. Not for every
# platform: without it, the tests that need it are skipped.
.cache/libtpu: $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ libtpu==$(LIBTPU) || mkdir -p $@
	touch $@

# What exported and imported models are compared with; apart from .venv, which stays what users have. PyTorch
# for CPUs: from the package index where that has it (200 MB), else from PyTorch's own. Without it, the tests that need it
# are skipped, and the next time it is tried again.
PEER_INSTALL = $(BIN)/pip install --quiet --no-deps --target $(@D)
.cache/transformers/.installed: $(INSTALLED) tests/requirements.txt
	rm -rf $(@D)
	$(PEER_INSTALL) -r tests/requirements.txt
	if $(PEER_INSTALL) torch==$(TORCH)+cpu 2> /dev/null || \
	    $(PEER_INSTALL) --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH); \
	then touch $@; else echo "no PyTorch for CPUs: tests against transformers are skipped"; fi

# What runs the notebooks; apart from .venv for the same reason.
.cache/notebooks/.installed: $(INSTALLED) tests/notebooks.txt
	rm -rf $(@D)
	$(PEER_INSTALL) -r tests/notebooks.txt
	touch $@

# What builds the manual; its packages want versions of their own.
.cache/docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet -r docs/requirements.txt
	touch $@
