PYTHON ?= python3
TIME ?= 5m
SEED ?= 1
SECTIONS ?=
.PHONY: help demo test bench chaos fuzz deaths mutants lint type cov clean

help:   ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

demo:   ## compress 300 files, a job each, with four at once; in a directory of its own
	@set -eu; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	queuectl() { $(PYTHON) "$(CURDIR)/queuectl.py" "$$@"; }; \
	files=$$($(PYTHON) -c 'import os; print(os.path.dirname(os.__file__))'); \
	cd "$$dir"; export QUEUECTL_DB="$$dir/queue.db"; \
	find "$$files" -name '*.py' -print0 | head -z -n 300 | \
	    queuectl enqueue --null -q - -- sh -c 'gzip -9 < "$$1" > "$$2.gz"' sh {} {#} >/dev/null; \
	queuectl enqueue -q --backoff-base 100ms 'echo "this one always fails"; exit 3' >/dev/null; \
	queuectl worker start --detach --count 4; queuectl wait --all || true; queuectl worker stop; \
	queuectl status; queuectl dlq; gzip -t ./*.gz; \
	echo "$$(ls ./*.gz | wc -l) of 300 files are compressed; one job was made to fail."; \
	[ "$$(ls ./*.gz | wc -l)" -eq 300 ]; \
	echo 'Next: `queuectl --help`, or `queuectl web` for the dashboard of your own queue.'

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
