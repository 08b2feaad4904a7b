#!/usr/bin/env bash
# Sets up (once, a few minutes) and runs the tests: `bash test.sh -m task3 -x`. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh requirements-dev.txt
HF_HUB_OFFLINE=1 "$PYTHON" -m pytest "$@"
