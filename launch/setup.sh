#!/usr/bin/env bash
# Make .venv from requirements.txt and install the package in it, editable. Quick when nothing has changed.
#   PYTHON=python3.11 bash launch/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

command -v "$python" >/dev/null || { echo "error: no $python on this machine: set PYTHON=/path/to/python (3.10 or newer)" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "error: $("$python" --version) is too old: set PYTHON=/path/to/python (3.10 or newer)" >&2; exit 2; }

wanted=$({ "$python" --version; cat requirements.txt pyproject.toml launch/setup.sh; } | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
stamp=.venv/installed.sha256
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

echo "Setting up .venv (once; a few minutes at most) ..." >&2
.venv/bin/python -m pip --version >/dev/null 2>&1 && [ "$(.venv/bin/python --version)" = "$("$python" --version)" ] ||
    "$python" -m venv --clear .venv ||
    { echo "error: $python cannot make a virtual environment: install its venv package (Debian: python3-venv)" >&2; exit 2; }
install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" && return
    echo "error: pip could not install $*, see above: check the network (behind a mirror or proxy: PIP_INDEX_URL, HTTPS_PROXY) and the" >&2
    echo "  space on the disk, and run the same command again; where a package has no build for $("$python" --version), set PYTHON=python3.11" >&2
    exit 2
}
install -r requirements.txt
install --no-deps --editable .
echo "$wanted" > "$stamp"
echo "Ready: .venv" >&2
