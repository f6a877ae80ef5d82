# Everyday commands; `make` lists them.
.DEFAULT_GOAL := help
.PHONY: help install test lint quickstart cards docs ci

help:  ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install:  ## install the package editable, with what tests and linters need
	python -m pip install -e ".[dev]"

test:  ## run the tests (those that need ../shared skip without it)
	python -m pytest -q

lint:  ## ruff check, ruff format --check, mypy --strict
	ruff check .
	ruff format --check .
	mypy

quickstart:  ## pre-train and refine a small model on bundled digits, a few minutes on a CPU
	accelerate launch training/refine.py

cards:  ## render the cards under model_cards/ from their results.yaml
	python -m model_cards.render

docs:  ## build the pages as a site (needs the extra docs)
	mkdocs build --strict

ci:  ## everything CI runs, in a fresh virtual environment
	.ci/run
