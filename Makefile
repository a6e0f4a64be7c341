# Each target sets up what it needs; `make demo` and `make test` work in a fresh clone.
VENV ?= .venv
RUN = $(VENV)/bin/

.PHONY: demo test lint bench clean

demo: $(VENV)/.ready
	$(RUN)python jobs/demo.py demo

test: $(VENV)/.ready
	$(RUN)python -m pytest

bench: $(VENV)/.ready
	for name in pixels plans memory scale classify export fidelity; do \
		$(RUN)python -m benchmarks.$$name || exit 1; \
	done

lint: $(VENV)/.ready
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info
