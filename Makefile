# `make` shows what there is. All targets share the environment .venv of this checkout; SGLANG=0.5.23 takes that version instead.

PYTHON := $(or $(PYTHON),python3)
ARGS ?=
# The version of SGLang. The default lives in .venv; another one in .venv-VERSION, a layer over it.
SGLANG ?= 0.5.17
BIN := $(if $(filter 0.5.17,$(SGLANG)),.venv,.venv-$(SGLANG))/bin
# Which tests `make test` runs.
MARKS ?= not long
# One thread per process: on small machines torch's thread pools fight over the cores and are twenty times slower.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

.PHONY: help env contract demo stress test test-long test-soak mutations lint docs stress-cache clean

help:
	@echo 'make demo    serve a tiny DeepSeek-V4 with SGLang and this cache on the CPU, and check every token'
	@echo 'make stress  serve it, send many requests at once, and check every answer; ARGS="--requests 2000" goes to the command'
	@echo 'make test    lint, types and all tests but the long ones; ARGS="-k name" goes to pytest'
	@echo 'make test-long      the tests that take minutes: kernels interpreted and compiled for SM80 to SM120, long walks, faults, slow starts'
	@echo 'make test-soak      the longest: a server killed ten times in a row, `compare` and `bench serve` with servers of their own'
	@echo 'make mutations  plant about 150 known faults, one at a time, and see a test of `make test` fail for each; ARGS=regions takes some'
	@echo 'make stress-cache   over 20,000 random operations on the cache, checked after each'
	@echo 'make docs    the documentation, as pages in build/docs; a dead link fails'
	@echo 'make lint    ruff and mypy'
	@echo 'make env     make .venv (the others do it by themselves); PYTHON=python3.12 names another Python'
	@echo 'SGLANG=0.5.23 after any of them takes that version of SGLang instead of $(SGLANG)'
	@echo 'make contract SGLANG=x.y.z   which names and behaviours of that SGLang are not as this plug-in expects'
	@echo 'make clean   remove .venv, caches and build folders'

env:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || { \
	  echo 'make env: $(PYTHON) is no Python 3.11 or 3.12; name one, as in `make env PYTHON=python3.11`' >&2; exit 1; }
	@$(PYTHON) tools/make_env.py $(SGLANG)

contract:
	@$(MAKE) --no-print-directory env SGLANG=0.5.17
	@.venv/bin/python tools/contract.py $(SGLANG)

demo: env
	@$(BIN)/python -m sglang_dsv4 demo $(ARGS)

stress: env
	@$(BIN)/python -m sglang_dsv4 stress --tiny $(ARGS)

lint: env
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

# Two processes, a file or a few in one of them: see `pytest_xdist_make_scheduler` in tests/conftest.py.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$(MARKS)" $(ARGS)

# Minutes: every fused kernel under Triton's interpreter, and compiled for six architectures; long random walks; slow starts.
test-long: env
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "long and not soak" $(ARGS)

test-soak: env
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m soak $(ARGS)

# An hour for all of them: each runs the tests that notice it.
mutations: env
	$(BIN)/python tools/mutations.py $(ARGS)

# Tables and picture in docs/ are written by docs/generate.py; the tests fail where they are out of date.
docs: env
	.venv/bin/python -m sphinx -W --keep-going -q -j 2 docs build/docs
	@echo 'build/docs/index.html'

stress-cache: env
	$(BIN)/python -m pytest tests/cache/test_machine.py --hypothesis-profile=long -rP $(ARGS)

clean:
	rm -rf .venv .venv-* .venv.lock build dist cpu-shims/build cpu-shims/*.egg-info *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find sglang_dsv4 kernels tests cpu-shims tools -name __pycache__ -type d -prune -exec rm -rf {} +
