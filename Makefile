# Everything needs Python 3.11 or newer and nothing else; the rest is installed into .venv here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.bench-installed
DIST_STAMP := $(VENV)/.dist-installed
DOCS_STAMP := $(VENV)/.docs-installed
PEERS := $(VENV)/peers
SUITES := $(PEERS)/suites
PEERS_STAMP = $(PEERS)/.installed
# Bytecode is written even where the environment forbids it: each of some thousand processes would
# compile again what was changed.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest
STORE ?=
DATA ?=
BASE ?=
OPTIONS ?=

.PHONY: demo test test-long test-peers check format bench bench-full bench-speed bench-soak bench-queries bench-compare dist docs clean

demo: $(STAMP)  ## the main job on real input: an orchestrator, three processes, one killed
	$(BIN)/hf-async-store demo $(if $(STORE),--store $(STORE)) $(if $(DATA),--data $(DATA))

test: $(STAMP)  ## every test but the long sweeps, with a sixth of its variants
	$(PYTEST) -n 4 --dist worksteal

test-long: $(STAMP)  ## all variants, and the long sweeps, too
	$(PYTEST) -n 4 --dist worksteal --hf-full -m "long or not long"

test-peers: $(STAMP) $(PEERS_STAMP)  ## the suites of other projects on the adapters in docs/examples; see docs/adapters.md
	$(BIN)/python tests/peers/run.py --python $(PEERS)/bin/python --suites $(SUITES) $(OPTIONS)

check: $(STAMP)  ## style, types by three checkers, and which layer may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/type_checks
	$(BIN)/python tests/type_checks/pages.py
	$(BIN)/lint-imports

dist: $(DIST_STAMP)  ## builds the archives of a release, and tries the wheel in an empty environment
	.ci/dist

docs: $(DOCS_STAMP)  ## the documentation site, in build/site; warnings and broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	$(BIN)/python -m docs_site.check_links build/site

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH_STAMP)  ## measures this machine within 2 minutes; the report is in benchmarks/results
	$(BIN)/hf-async-store bench --short --output benchmarks/results

bench-full: $(BENCH_STAMP)  ## everything within 20 minutes; writes the results into docs/benchmarks.md
	$(BIN)/hf-async-store bench --full --output benchmarks/results --page docs/benchmarks.md

bench-speed: $(STAMP)  ## each engine beside what is written by hand, and latencies under load; writes docs/benchmarks.md
	$(BIN)/hf-async-store bench --speed --output benchmarks/results/speed --page docs/benchmarks.md $(OPTIONS)

bench-soak: $(STAMP)  ## the longest pause of the event loop in ten minutes; OPTIONS: of another engine
	$(BIN)/hf-async-store bench --output benchmarks/results/soak --duration 600 $(if $(OPTIONS),$(OPTIONS),--only json --workload "soak of json")

bench-queries: $(STAMP)  ## what queries cost on stores of 1,000 to 1,000,000 machines; takes 10 minutes
	$(BIN)/hf-async-store bench --output benchmarks/results --entities 1000000 $(foreach engine,json sqlite postgresql,--workload "queries of $(engine)")

bench-compare: $(STAMP)  ## BASE=commit: is this checkout slower or faster than that commit?
	$(BIN)/python -m hf_async_store_bench.two_commits $(BASE) $(OPTIONS)

# The test servers have an environment of their own: what they require would rule out our drivers.
$(STAMP): pyproject.toml benchmarks/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group lint --editable ".[all]" --editable benchmarks
	$(PYTHON) -m venv $(VENV)/servers
	$(VENV)/servers/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)/servers/bin/python -m pip install --quiet --group benchmarks/pyproject.toml:servers
	$(BIN)/python -m compileall -q hf_async_store benchmarks/hf_async_store_bench  # also where PYTHONDONTWRITEBYTECODE is set
	touch $(STAMP)

# The alternatives that a full run measures beside the engines.
$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable "benchmarks[competitors]"
	touch $(BENCH_STAMP)

$(DIST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group release
	touch $(DIST_STAMP)

# The other projects have an environment of their own, and so have no say in the versions of ours. Their
# suites are in the source archives, except that of py-key-value.
$(PEERS_STAMP): pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(PEERS)/bin/python -m pip install --quiet --group peers --editable ".[all]"
	$(PEERS)/bin/python -m pip install --quiet --no-deps fastapi-users-db-sqlalchemy==7.0.0
	mkdir -p $(SUITES)
	$(PEERS)/bin/python -m pip download --quiet --no-deps --no-binary :all: --dest $(SUITES) apscheduler==4.0.0a6 fastapi-users-db-sqlalchemy==7.0.0 langgraph-checkpoint-sqlite limits
	for each in $(SUITES)/*.tar.gz; do tar -xzf $$each -C $(SUITES); done
	touch $(PEERS_STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $(DOCS_STAMP)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
