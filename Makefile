# make pipeline: fine-tune, evaluate, calibrate, draw.   make test: run the tests.
# Both create .venv and install the pinned requirements first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread for each of two workers, nothing from the network, and compiled modules are kept: the
# tests start dozens of processes.
TESTING := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=

.PHONY: pipeline test slow-test check format charts embedded-model readme benchmark clean help

help:
	@echo "make pipeline        fine-tune, evaluate on held-out data, calibrate, draw the charts"
	@echo "make test            run the tests"
	@echo "make slow-test       a million rows within their limits, long simulations, servers under load"
	@echo "make check           formatting, lint, types, generated files (what CI runs besides the tests)"
	@echo "make format          rewrite the code in the project's format"
	@echo "make charts          draw images/ again from evaluation_cache/"
	@echo "make readme          rewrite the measured numbers in README.md from evaluation_cache/"
	@echo "make benchmark       how fast it is beside other ways; some 20 minutes on two idle cores"
	@echo "make clean           remove .venv and everything that is not in the repository"

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

pipeline: $(VENV)/.installed
	$(BIN)/python run_complete_pipeline.py

charts: $(VENV)/.installed
	$(BIN)/python generate_all_charts.py --force

readme: $(VENV)/.installed
	$(BIN)/python update_readme.py

benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/speed.py

test: $(VENV)/.installed-dev
	$(TESTING) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

slow-test: $(VENV)/.installed-dev
	$(TESTING) $(BIN)/python -m pytest -q -m slow -n 2

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python dataset/generate_dataset.py --check
	$(BIN)/python update_readme.py --check

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) fine_tuned_sentiment_model checkpoints .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
