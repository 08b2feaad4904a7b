#!/usr/bin/env bash
# Sets up (once, a few minutes) and runs the tests: offline, on the CPU.
# Arguments go to pytest: `bash test.sh -x`, `bash test.sh -k eq13`.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh requirements-dev.txt
HF_HUB_OFFLINE=1 "$PYTHON" -m pytest "$@"
