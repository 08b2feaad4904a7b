#!/usr/bin/env bash
# Sets up (once, a few minutes) and runs the tests: offline, on the CPU, in two processes of one thread each.
# Arguments go to pytest, in one process: `bash test.sh -x`, `bash test.sh -k eq13`.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh requirements-dev.txt
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile
export OMP_NUM_THREADS=1  # at the size of these tests a second thread gains nothing
HF_HUB_OFFLINE=1 "$PYTHON" -m pytest "$@"
