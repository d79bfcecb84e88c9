#!/usr/bin/env bash
# The tests that are marked slow: minutes each, among them the rest of the same-bits gate.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m pytest -m slow "$@"
