# Needs Python 3.10 or newer with venv and pip, and nothing else.
#   make quickstart   convert the bundled model to 5.0 bits per weight and print the figures
#   make test         lint, types and tests
#   make clean        remove what these made, except .venv

PYTHON = python3
PIP = .venv/bin/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: quickstart test clean

quickstart: .venv/installed
	.venv/bin/python -m exlq convert -i tests/assets/tiny-llama -o quickstart -b 5.0 --threads 1

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -n 2

.venv/installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("%s is Python %s; 3.10 or newer is needed: make PYTHON=..." % (sys.executable, sys.version.split()[0]) if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	@echo "installing the versions of constraints.txt into .venv; torch is large"
	$(PIP) pip setuptools
	$(PIP) torch==2.13.0
	$(PIP) --no-build-isolation -e '.[test,eval,ray]'
	@touch $@

clean:
	rm -rf quickstart build dist exlq.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
