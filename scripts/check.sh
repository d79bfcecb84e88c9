#!/usr/bin/env bash
# Lint and types, as configured in pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m ruff check .
python -m ruff format --check .
python -m mypy
