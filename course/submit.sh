#!/usr/bin/env bash
# Runs the tests, shows the points, and packs what is handed in: submission.zip.
set -euo pipefail
cd "$(dirname "$0")"
bash test.sh --tb=no --junitxml=points.xml || echo "Some tests fail. Your files are packed all the same." >&2
. ./setup.sh requirements-dev.txt
"$PYTHON" - <<'PY'
import json
import zipfile

with open("tests/given.json") as file:
    task_files = json.load(file)["files"]
with zipfile.ZipFile("submission.zip", "w", zipfile.ZIP_DEFLATED) as submission:
    for path in (*task_files, "tests/given.json", "answers.md", "points.xml"):
        submission.write(path)
PY
echo "wrote submission.zip"
if grep -q "^## " answers.md && ! grep -qv "^## \|^\s*$" answers.md; then
  echo "Note: answers.md has no answers yet." >&2
fi
