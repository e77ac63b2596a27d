# Sourced by the other scripts: makes (or reuses) a virtual environment and installs mindspeed with the given extras.
# Variables: PYTHON (interpreter to use), MINDSPEED_VENV (where the environment lives, default .venv in the checkout).

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.12 python3.10 python3.13 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.10 or newer found; install one or set PYTHON=/path/to/python" >&2
  return 1
}

make_environment() { # make_environment EXTRAS
  local root venv python stamp wanted
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  venv=${MINDSPEED_VENV:-$root/.venv}
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python) || return 1
    echo "Making a virtual environment in $venv with $("$python" --version) ..."
    "$python" -m venv "$venv" || { echo "error: '$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; return 1; }
  fi
  # Installing is skipped when nothing that decides it has changed since the last time.
  wanted="$1 $root $(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
  stamp="$venv/.mindspeed-installed"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing mindspeed[$1] (about two minutes the first time) ..."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root[$1]" || {
      echo "error: installation failed; see the message above. Behind a proxy or mirror set PIP_INDEX_URL and run again." >&2
      return 1
    }
    echo "$wanted" >"$stamp"
  fi
  # shellcheck disable=SC1091
  . "$venv/bin/activate"
}
