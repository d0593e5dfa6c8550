# The project's commands. On a fresh machine each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: serve test lint proto setup clean

serve: setup  ## Serve the demo model on two ranks, show one answer, serve until Ctrl-C.
	@$(BIN)/octavo serve --tensor-parallel-size 2 --first-request "What is 27 + 15?"

# Whole servers under load keep all cores busy for as long as they run: beside each other they take twice as long, and
# ranks are taken for hung. The rest does not.
test: setup  ## All tests: on two processes, but for those that keep all cores busy, which come one by one.
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not alone"
	@$(BIN)/python -m pytest -m alone tests/system

lint: setup  ## Style, types, import rules.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/mypy && ln -sfn $(CURDIR) $(VENV)/mypy/octavo
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: setup  ## Regenerate the checked-in protobuf code.
	$(BIN)/python scripts/generate_proto.py

setup: $(VENV)/.installed

# pip shows its own progress; the stamp is written only after a whole install.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
