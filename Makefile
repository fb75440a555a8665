PYTHON ?= python3
TIME ?= 5m
SEED ?= 1
SECTIONS ?=
.PHONY: help demo test bench chaos fuzz deaths mutants lint type cov clean

help:   ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

demo:   ## compress real files, a job each, check every result; some jobs fail on purpose
	$(PYTHON) test_queuectl.py --demo

test:   ## run the tests; needs Python alone
	$(PYTHON) -m unittest

bench:  ## measure it beside the limits and rivals: ratios, medians; a table
	$(PYTHON) test_queuectl.py --bench

chaos:  ## break it for TIME=5m by SEED=1: kills, locks, pipes, clocks; a verdict
	$(PYTHON) test_queuectl.py --chaos $(TIME) --seed $(SEED)

fuzz:   ## try the HTTP API by its own description, 5,000 cases, if schemathesis is installed
	$(PYTHON) test_queuectl.py --fuzz

deaths: ## let it die at every line it meets, and within its writes; some minutes
	$(PYTHON) test_queuectl.py --crash-points

mutants: ## change each decision in each way, and say what no test notices; half an hour
	$(PYTHON) test_queuectl.py --mutants $(SECTIONS)

lint:   ## ruff, if installed
	$(PYTHON) -m ruff check .

type:   ## mypy --strict, if installed
	$(PYTHON) -m mypy

cov:    ## branch coverage by the tests, all their processes included, if coverage is there
	$(PYTHON) -m coverage erase
	-$(PYTHON) -m coverage run -m unittest
	$(PYTHON) -m coverage combine -q
	$(PYTHON) -m coverage report

clean:  ## remove what tools leave behind
	rm -rf build dist *.egg-info __pycache__ .coverage* .mypy_cache .ruff_cache
