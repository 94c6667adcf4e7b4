# Two commands get you there: `make demo` and `make test`. Everything installs into .venv with pinned versions.
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location -c constraints.txt
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: help demo test coverage lint test-system bench docs clean

help:            ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/demo: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once; a minute or two)"
	@python3 -m venv $(VENV)
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/dev: $(VENV)/demo
	@$(INSTALL) -e '.[demo,postgres,text,ray,grpc,otel,sign,test,docs]'
	@touch $@

demo: $(VENV)/demo   ## the whole loop on real handwritten digits: installs, then runs for about a minute
	@$(BIN)/trilobe demo

test: $(VENV)/dev lint   ## all tests, after the linters
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

coverage: $(VENV)/dev   ## which lines the tests do not run (a quarter slower)
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term $(PYTEST)

lint: $(VENV)/dev   ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-system:     ## Debian packages that some tests need; without them those tests skip and say so
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium iproute2 postgresql prometheus skopeo >/dev/null

bench: $(VENV)/dev   ## the quick form of every benchmark
	@for run in benchmarks/*/run.py; do echo "== $$run"; $(BIN)/python $$run --quick || exit 1; done

docs: $(VENV)/dev   ## the documentation, into site/
	$(BIN)/sphinx-build -q -W --keep-going docs site
	@echo "open site/index.html"

clean:           ## everything that can be made again
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
