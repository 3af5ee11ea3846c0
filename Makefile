# The first target that needs it sets up .venv. This requires Python 3.11 or later.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# LOCK=1 installs exactly the versions of requirements.lock. Without it pip chooses versions that pyproject.toml allows.
LOCK ?=
PINS := $(if $(LOCK),--constraint requirements.lock)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test test-fast test-long check format docs audit lock golden clean

setup: $(STAMP)

# Install torch first, so that no other package pulls in another build of it.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; name it with make PYTHON=python3.x" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PINS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet $(PINS) --editable ".[data,eval,hf,wandb,mauve,vision,repl,docs,dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

# All tests but the long ones, in one process per core, at most four, with one thread each. worksteal moves tests to idle processes.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not long" -n logical --maxprocesses 4 --dist worksteal

# Run after each edit: the test files marked with pytestmark = pytest.mark.fast, whose tests take milliseconds each. Only
# these files are imported.
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

# Builds the documentation site in site/. With --strict a broken link or an unknown name is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Reports known vulnerabilities of the versions in requirements.lock. It uses its own environment, so that it does not change
# the installed versions. With --strict it fails if the service does not answer for a package.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet "pip-audit>=2.7,<3"
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement requirements.lock

# Rewrites requirements.lock from the installed packages. Local version tags (torch's +cpu) are removed, because package
# indexes do not know them.
lock: $(STAMP)
	@{ sed -n '/^#/p' requirements.lock; $(BIN)/python -m pip freeze --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*\)==\([0-9][^+ ]*\).*/\1==\2/p' | sed 's/^\([^=]*\)/\L\1/; :again s/^\([^=]*\)[_.]/\1-/; t again' | LC_ALL=C sort; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

# Records the golden loss curves that are missing. NAME=denoise rewrites that curve and ALL=1 rewrites every curve; do so only
# after a change that is meant to alter them. Both are unset here, so that variables of the shell do not count.
NAME :=
ALL :=
golden: $(STAMP)
	$(BIN)/python tests/golden/make_golden.py $(NAME) $(if $(ALL),--all)

clean:
	rm -rf $(VENV) .venv-audit runs site
