# Each target sets up what it needs; `make demo` and `make test` work in a fresh clone.
VENV ?= .venv
RUN = $(VENV)/bin/

# What test-spark35 and test-spark40 run: all tests, or those that are named.
TESTS ?=

.PHONY: demo test test-rapids test-stores test-layouts test-spark35 test-spark40 lint bench bench-peers bench-stores clean

demo: $(VENV)/.ready
	$(RUN)python -m examples.demo demo

# Two files of tests at a time; `pytest -m "not rapids and not cluster"` takes the quick ones.
test: $(VENV)/.ready
	$(RUN)python -m pytest -n 2 --dist loadfile

# What the RAPIDS plugin says of the job's plans; fetches the plugin, 1 GB, from Maven Central.
test-rapids: $(VENV)/.ready
	$(RUN)python -m pytest -m rapids tests/test_rapids.py tests/test_cluster.py

# Object stores: real servers on this machine, which are fetched first.
test-stores: .stores/.ready
	$(RUN)python -m pytest -n 2 --dist loadfile -m stores $(TESTS)

.stores/.ready: scripts/fetch_stores.sh $(VENV)/.ready
	VENV=$(VENV) scripts/fetch_stores.sh

# Inputs that other programs write, written by them: Hugging Face's datasets, and img2dataset. Its
# requirement `dataclasses` would stand before Python's own.
test-layouts: .layouts/.ready
	$(RUN)python -m pytest -m layouts

.layouts/.ready: constraints-layouts.txt $(VENV)/.ready
	rm -rf .layouts
	$(RUN)pip install -q --disable-pip-version-check --target .layouts -r $<
	rm -f .layouts/dataclasses.py
	touch $@

# The same tests on another Spark, which stands before the environment's own on the Python path.
test-spark35 test-spark40: test-%: .%/.ready
	PYTHONPATH=$(CURDIR)/.$*:$(CURDIR) $(RUN)python -m pytest -n 2 --dist loadfile $(TESTS)

.spark35/.ready .spark40/.ready: .%/.ready: constraints-%.txt $(VENV)/.ready
	rm -rf .$*
	$(RUN)pip install -q --disable-pip-version-check --target .$* -r $<
	touch $@

# Other systems on the same shards; their packages stand before the environment's own, since Daft
# wants an older pyarrow.
bench-peers: .peers/.ready
	PYTHONPATH=$(CURDIR)/.peers:$(CURDIR) $(RUN)python -m benchmarks.peers
	PYTHONPATH=$(CURDIR)/.peers:$(CURDIR) $(RUN)python -m benchmarks.peers --rounds 1 --images 65 \
		--model vit_base_patch32_clip_quickgelu_224.openai

.peers/.ready: constraints-peers.txt $(VENV)/.ready
	rm -rf .peers
	$(RUN)pip install -q --disable-pip-version-check --target .peers -r $<
	touch $@

bench-stores: .stores/.ready
	$(RUN)python -m benchmarks.stores

bench: $(VENV)/.ready
	for name in pixels tower detectors open_nsfw breakdown start plans memory scale waves classify export fidelity; do \
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
	rm -rf $(VENV) .spark35 .spark40 .peers .layouts .stores demo build dist *.egg-info
