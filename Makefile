# `make demo` and `make test` need nothing but Python 3.11 or later: they set up .venv first, once.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# make setup LOCK=1 installs the versions of requirements.lock, and of nothing else any version that pyproject.toml allows.
LOCK ?=
PINS := $(if $(LOCK),--constraint requirements.lock)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test test-fast test-long check format docs audit lock golden clean

setup: $(STAMP)

# torch comes first: with it installed, no other package pulls in another build of it.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; name it with make PYTHON=python3.x" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PINS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet $(PINS) --editable ".[data,eval,hf,wandb,mauve,repl,docs,dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

# As many processes as cores, at most four, each with one thread; what one has not begun another takes, so that none idles at the end.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not long" -n logical --maxprocesses 4 --dist worksteal

# The tests of the core that take milliseconds each (pytestmark = pytest.mark.fast): for after each edit. Only the files that
# hold the mark are imported.
test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "fast and not long" -n logical --maxprocesses 4 --dist worksteal $$(grep -rl --include='test_*.py' '^pytestmark = pytest.mark.fast' tests)

test-long: $(STAMP)
	$(BIN)/python -m pytest -q -m long

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site, in site/. --strict: a broken link or an unknown name fails.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Known vulnerabilities of the versions in requirements.lock. It has an environment of its own, so that it changes none of
# these, and fails (--strict) where the service cannot be asked about one of them.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet "pip-audit>=2.7,<3"
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement requirements.lock

# Writes requirements.lock anew from what is installed; a local build's tag (torch's +cpu) is no part of a version to ask for.
lock: $(STAMP)
	@{ sed -n '/^#/p' requirements.lock; $(BIN)/python -m pip freeze --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*\)==\([0-9][^+ ]*\).*/\1==\2/p' | sed 's/^\([^=]*\)/\L\1/; :again s/^\([^=]*\)[_.]/\1-/; t again' | LC_ALL=C sort; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

# Rewrites the golden loss curves; only for a change that is meant to change them.
golden: $(STAMP)
	$(BIN)/python tests/golden/make_golden.py

clean:
	rm -rf $(VENV) .venv-audit runs site
