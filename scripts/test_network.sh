#!/usr/bin/env bash
# The tests of SmolLM2, which is downloaded on their first run (93 MB). All others need no network.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m pytest -m network "$@"
