# `make` alone says what there is. Everything happens in a virtual environment of its own, .venv.

PYTHON ?= python3
BIN := .venv/bin
TESTS ?= tests

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check audit bench bench-polling soak lock image clean

help:  ## Say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 12

install: .venv/.installed  ## Install Relay and what it needs, as locked

demo: install  ## Watch Relay at work: simulated providers, a verifying subscriber, no key
	@$(BIN)/relay demo

# Tests wait more than they compute: three at once keep two cores busy.
test: .venv/.installed-dev tests/verifiers/javascript/node_modules  ## Install what the tests need, and run all of them
	$(BIN)/pytest -n 3 --dist loadgroup $(TESTS)

# RELAY_THOROUGH: whole fleets are killed, restarted, hung and robbed of their database far more often.
test-all: .venv/.installed-dev tests/verifiers/javascript/node_modules  ## The same with many more examples each and in more languages
	RELAY_REQUIRE_ALL_TESTS=1 RELAY_THOROUGH=1 $(BIN)/pytest -n 2 --dist loadgroup --hypothesis-profile thorough $(TESTS)

check: .venv/.installed-dev  ## Lint, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Needs the network. What the service does not know counts as a finding: no answer is no clean bill.
audit: .venv/.installed-dev  ## Look for known vulnerabilities in what the lock files name
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r requirements-dev.lock

bench: .venv/.installed-dev  ## Measure: how fast, how soon, how fair, on both databases (about half an hour)
	$(BIN)/python -m bench.delivery --json bench/results.json
	$(BIN)/python -m bench.scaling --json bench/results-scaling.json
	$(BIN)/python -m bench.pruning

bench-polling: .venv/.installed-dev  ## Measure: how soon an end is known, for how many requests (some minutes)
	$(BIN)/python -m bench.polling --plot docs/polling.svg
	$(BIN)/python -m bench.watched

soak: .venv/.installed-dev  ## An hour of load, faults and restarts: nothing lost, nothing grows
	$(BIN)/python -m bench.soak --plot docs/soak.svg --json bench/results-soak.json

lock: .venv/.installed-dev  ## Write the lock files anew, with the newest versions
	$(BIN)/uv pip compile -q --upgrade pyproject.toml --all-extras --group build --group dev --universal \
	  --python-version 3.11 --generate-hashes --no-header -o requirements-dev.lock
	$(BIN)/uv pip compile -q --upgrade pyproject.toml --all-extras --group build --universal --python-version 3.11 \
	  --generate-hashes --no-header -c requirements-dev.lock -o requirements.lock

image:  ## Build the container image
	docker build -t relay .

clean:  ## Remove what was installed
	rm -rf .venv tests/verifiers/javascript/node_modules

# The index is asked for exactly these files: a package that was changed meanwhile is refused.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "Python cannot make a virtual environment here: apt-get install python3-venv"; exit 1; }

.venv/.installed: requirements.lock pyproject.toml | .venv/bin/python
	$(PIP_INSTALL) --require-hashes -r requirements.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.installed-dev: requirements-dev.lock .venv/.installed
	$(PIP_INSTALL) --require-hashes -r requirements-dev.lock
	@touch $@

# Verifying in JavaScript needs Node.js; without it those tests say so and are skipped. The other languages' tools
# are asked for by the tests themselves (tests/test_verifiers.py).
tests/verifiers/javascript/node_modules: tests/verifiers/javascript/package-lock.json
	@if command -v npm >/dev/null; then npm ci --loglevel=error --no-audit --no-fund --prefix tests/verifiers/javascript && touch $@; \
	else echo "no npm here: the JavaScript tests will be skipped (apt-get install nodejs npm)"; fi
