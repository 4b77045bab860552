PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test check lint reference check-published

help:
	@echo "make setup   the environment, the embedded model and corpora, and its calibration (minutes once, then seconds)"
	@echo "make demo    VECTOR at a tenth of the bytes beside its controls, needle in a haystack, on the embedded model"
	@echo "make test    the tests"
	@echo "make lint    ruff and mypy"
	@echo "make check   lint and test"
	@echo "make reference   every method at four budgets on three tasks, and the leaderboard of it (hours; resumable)"
	@echo "make check-published [TIER=quick|full] [MODEL=...]   published figures, re-made where there is a GPU and the hub"

# Made with another Python: make setup PYTHON=python3.13
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

setup: .venv/.installed
	$(BIN)/python -m kvbench.fetch
	$(BIN)/python scripts/calibrate.py model=smollm2-135m

demo: setup
	$(BIN)/python -m kvbench.run -m method=full,streamingllm,vector,tiered budget=0.1 task=niah task.max_new_tokens=32 limit=8

# Two processes of one thread each: torch's threads get in each other's way when processes share cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint test

# Of the figure; the leaderboard has all.
SHOWN = snapkv kvzip keydiff streamingllm random vector tiered snapkv_4bit kivi quest h2o duoattention
# Hours, once; the same command continues.
reference: setup
	$(BIN)/python -m kvbench.experiment reference --jobs 2
	$(BIN)/python scripts/leaderboard.py results/reference --out results/reference/leaderboard.html
	$(BIN)/python scripts/pareto.py results/reference --metric answer_nll --methods $(SHOWN) --out results/reference/nll

TIER ?= quick
check-published: .venv/.installed
	$(BIN)/python scripts/check_published.py --tier $(TIER) $(if $(MODEL),--model $(MODEL))
