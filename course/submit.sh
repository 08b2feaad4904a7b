#!/usr/bin/env bash
# Runs the tests, shows the points, and packs what is handed in: submission.zip.
set -euo pipefail
cd "$(dirname "$0")"
bash test.sh --tb=no || echo "Some tests fail. Your files are packed all the same." >&2
. ./setup.sh requirements-dev.txt
"$PYTHON" -m zipfile -c submission.zip ./*.py speed answers.md
echo "wrote submission.zip"
if ! grep -qv "^## \|^\s*$" answers.md; then
  echo "Note: answers.md has no answers yet." >&2
fi
