# Two commands matter: `make demo` and `make test`. Both need Python 3.11 or newer with venv, and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
LOCK   := .ci/requirements-dev.txt
READY  := $(VENV)/.ready

.PHONY: demo test lint types floors pytest interop simulate bench-failover bench-latency bench-journal bench-index bench-delegation bench-redis bench-events bench-near bench-sqlite openapi schema lock clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint types floors pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

floors: $(READY)
	$(BIN)/lint-imports

pytest: $(READY)
	$(BIN)/pytest --cov --cov-report=term

# Build what the daemons of other languages need ahead of the tests, which otherwise do it themselves.
interop: $(READY)
	$(BIN)/python -m tests.interop.rust_daemon

# 10,000 seeded scenarios of delivery; a failure prints the seed that replays it.
simulate: $(READY)
	$(BIN)/python -m tests.simulator --scenarios 10000 --jobs 2

# 100 kills and 100 black holes of the hub under load; table on the terminal, figures and plot in bench/results.
bench-failover: $(READY)
	$(BIN)/python -m bench.failover

# Injected latency from 0 to 500 ms against the stage reached and the time taken.
bench-latency: $(READY)
	$(BIN)/python -m bench.latency_stages

# How many busts a second the journal takes, alone and with many callers that share its commits.
bench-journal: $(READY)
	$(BIN)/python -m bench.journal

# Counted steps and time of each operation of the index, from 10^3 to 10^6 entries.
bench-index: $(READY)
	$(BIN)/python -m bench.index_scaling

# Counted steps and latency of busts, from 10^3 to 10^6 registered entries.
bench-delegation: $(READY)
	$(BIN)/python -m bench.delegation

# A bust of 100,000 entries in Redis: time to the answer, longest block of the daemon, what others wait for meanwhile.
bench-redis: $(READY)
	$(BIN)/python -m bench.redis_prefix

# Look-ups and stores a second in an SQLite file, from one process and two, and a bust of 100,000 entries in it.
bench-sqlite: $(READY)
	$(BIN)/python -m bench.sqlite_cache

# How soon 1,000 readers of events hear of a bust, and what each costs the daemon.
bench-events: $(READY)
	$(BIN)/python -m bench.events

# What a hit, a load and a bust cost in a near cache, and how soon another client's cache knows of a bust.
bench-near: $(READY)
	$(BIN)/python -m bench.near_cache

# One environment, pinned and hashed; made again only when the lock or the project's metadata change.
$(READY): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "pybustcall needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

# Write the contract and the schema of capability documents anew after a change of the models or routes.
openapi: schema
	$(BIN)/python -c "import yaml; from pybustcall.daemon.openapi import openapi_document; \
	    print(yaml.safe_dump(openapi_document(), sort_keys=False, width=110), end='')" > docs/reference/openapi.yaml

schema: $(READY)
	$(BIN)/python -c "import json; from pybustcall.capabilities import capability_schema; \
	    print(json.dumps(capability_schema(), indent=2))" > docs/reference/capabilities.schema.json

# Write the page of the daemon's settings anew after a change of the model.
settings: $(READY)
	$(BIN)/python -c "from pybustcall.daemon.settings_page import settings_page; \
	    print(settings_page(), end='')" > docs/reference/daemon-settings.md

# Pin anew what the lock names. Run by hand, with a network; commit the result.
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-header --no-strip-extras --all-extras --group dev --upgrade --output-file $(LOCK) pyproject.toml

clean:
	rm -rf $(VENV) .venv-lock build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
