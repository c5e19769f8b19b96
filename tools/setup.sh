#!/usr/bin/env bash
# Make the virtual environment .venv and install the package with some extras, unless that is done already.
# Usage: tools/setup.sh EXTRAS        (for example: tools/setup.sh cli,train,report)
set -euo pipefail
cd "$(dirname "$0")/.."
extras=$1
stamp=.venv/.installed-$(printf '%s' "$extras" | tr ',' '-')
wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

find_python() {
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      command -v "$name"; return
    fi
  done
  echo "outlast needs Python 3.11 or later; on Debian and Ubuntu: apt-get install python3 python3-venv" >&2
  exit 1
}

make_venv() {
  "$1" -m venv .venv 2>/dev/null && [ -x .venv/bin/pip ]
}

if [ ! -x .venv/bin/pip ]; then
  python=$(find_python)
  echo "Making .venv with $($python --version) ..."
  if ! make_venv "$python"; then
    # Debian and Ubuntu keep venv's pip in a package of its own.
    rm -rf .venv
    package=$("$python" -c 'import sys; print(f"python3.{sys.version_info[1]}-venv")')
    as_root=""
    if [ "$(id -u)" != 0 ]; then as_root="sudo -n"; fi
    if ! { $as_root apt-get update -qq && $as_root apt-get install -y -qq "$package"; } >/dev/null 2>&1 || ! make_venv "$python"; then
      echo "Python's venv is not complete; install it and try again: apt-get install $package" >&2
      exit 1
    fi
  fi
fi
echo "Installing outlast[$extras] (the first time takes some minutes: PyTorch is large) ..."
.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]" 2> >(grep -v 'is ignored: it is neither a file nor a directory' >&2)
printf '%s' "$wanted" > "$stamp"
