# On a fresh machine:  make run   shows a pattern compiled and running
#                      make test  runs every test
# Also: make check (formatting, lint, types, tests), make bench (ours beside its peers), make clean.
# Everything installed lies in .venv and .venv-newest here. Another interpreter: make PYTHON=python3.12 run

PYTHON ?= python3
VENV   := .venv
NEWEST := .venv-newest
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
# A second pip call may neither replace torch nor move what the versions below pin.
PINNED := $(VENV)/constraints.txt

# Without an NVIDIA GPU: this torch, and the triton whose CPU interpreter the tests run on (that one needs numpy < 2.4).
TORCH  := 2.13.0
TRITON := 3.6.0
NUMPY  := numpy<2.4
# Named after the versions: a change of them makes a new environment.
BASE   := $(VENV)/base-$(TORCH)-$(TRITON)

# Tests start some hundred processes: each would compile this package again where its bytecode is not kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-suite test-hopper test-newest check lint bench clean
.DELETE_ON_ERROR:

run: $(VENV)/installed
	$(VENV)/bin/attndsl run examples/patterns/streaming.attn

test: test-suite test-hopper test-newest

test-suite: $(VENV)/installed-dev
	@$(PY) -c "import numpy, torch; print('torch', torch.__version__, 'numpy', numpy.__version__)"
	$(PY) -m pytest -n 2

# Every kernel that the examples have for Hopper, compiled: about three minutes of two cores.
test-hopper: $(VENV)/installed-dev
	$(PY) -m pytest -n 2 -m every_example

# The tests marked triton_newest once more, against the newest triton that the index has.
test-newest: $(VENV)/installed-dev $(NEWEST)/installed
	@PYTHONPATH=$(NEWEST) $(PY) -c "import triton; print('triton', triton.__version__, triton.__file__)"
	PYTHONPATH=$(NEWEST) $(PY) -m pytest -n 2 -m triton_newest

check: lint test

lint: $(VENV)/installed-dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(VENV)/installed
	@set -ex; if nvidia-smi -L >/dev/null 2>&1; then \
	    $(PY) -m benchmarks forward; $(PY) -m benchmarks backward; \
	else $(PY) -m benchmarks cpu; fi

clean:
	rm -rf $(VENV) $(NEWEST) build dist attndsl.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# With a GPU, a torch that the interpreter already has and that reaches the GPU is kept: it is gigabytes, and was
# chosen for this machine's driver. (The interpreter may be of a virtual environment itself, whose packages a new one
# sees only through a .pth file.) Without a GPU the exact versions above are installed.
$(BASE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "attndsl needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "Name another interpreter, for example: make PYTHON=python3.12 run" >&2; exit 1; }
	@set -e; \
	make_venv() { $(PYTHON) -m venv --clear "$$@" $(VENV) || { \
	    echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; }; \
	if ! nvidia-smi -L >/dev/null 2>&1; then \
	    echo "no NVIDIA GPU: installing torch==$(TORCH)"; make_venv; \
	    $(PIP) install -q 'torch==$(TORCH)' '$(NUMPY)'; \
	    printf '%s\n' 'triton==$(TRITON)' '$(NUMPY)' > $(PINNED); \
	elif $(PYTHON) -c 'import torch; ok = torch.__version__ >= (2, 11) and torch.cuda.is_available(); exit(not ok)' \
	        2>/dev/null; then \
	    echo "NVIDIA GPU: keeping the torch of $(PYTHON)"; make_venv --system-site-packages; \
	    $(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' > $(VENV)/torch.pth; \
	    mv $(VENV)/torch.pth "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	    printf '%s\n' '$(NUMPY)' > $(PINNED); \
	else \
	    echo "NVIDIA GPU: installing torch"; make_venv; \
	    $(PIP) install -q 'torch>=2.11' '$(NUMPY)'; \
	    printf '%s\n' '$(NUMPY)' > $(PINNED); \
	fi; \
	$(PY) -c 'import torch; print("torch==" + torch.__version__)' >> $(PINNED)
	@touch $@

$(VENV)/installed: $(BASE) pyproject.toml
	$(PIP) install -q -c $(PINNED) 'setuptools>=77'
	$(PIP) install -q -c $(PINNED) --no-build-isolation -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install -q -c $(PINNED) --no-build-isolation -e '.[dev,examples]'
	@touch $@

# Only the newest triton lies here; the rest comes from .venv. On the path before it, it hides that one's triton.
$(NEWEST)/installed: $(BASE)
	rm -rf $(NEWEST)
	$(PIP) install -q --no-deps --upgrade --target $(NEWEST) triton
	@touch $@
