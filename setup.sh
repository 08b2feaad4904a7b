# Sourced by train.sh and test.sh: `. ./setup.sh requirements.txt`. Leaves the interpreter in $PYTHON.
#
# Makes .venv and installs the given requirements once; a second run finds them there and goes on at
# once. `PYTHON=/path/to/python bash train.sh` uses an environment of your own as it is.
if [ -z "${PYTHON:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  PYTHON=.venv/bin/python
  cat requirements.txt "$1" > .venv/wanted.txt
  if ! cmp -s .venv/wanted.txt ".venv/installed-$1"; then
    echo "Installing packages from $1 into .venv (a few minutes, once) ..."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"
    mv .venv/wanted.txt ".venv/installed-$1"
  fi
fi
