#!/usr/bin/env bash
# Make .venv from requirements.txt and install the package in it, editable. Quick when nothing has changed.
#   PYTHON=python3.11 bash launch/setup.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started as `sh FILE`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }
newer="set PYTHON=/path/to/python (3.10 or newer)"

# Two that were started at once do not write one environment: the second waits, and finds it made.
if [ -w . ] && { [ ! -e .venv.lock ] || [ -w .venv.lock ]; } && command -v flock > /dev/null; then
    exec 9> .venv.lock
    flock -n 9 2> /dev/null || [ $? != 1 ] || { # other codes: a file system without locks
        echo "Another set-up of .venv is at work: waiting for its end ..." >&2
        flock 9
    }
fi

# An environment that works stays, with all that is installed in it, whichever python3 this shell has.
python=${PYTHON:-python3}
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; }
if [ -z "${PYTHON:-}" ] && [ -f .venv/bin/activate ] && is_new_enough .venv/bin/python; then
    python=.venv/bin/python
fi
command -v "$python" > /dev/null || fail "no $python on this machine: $newer"
is_new_enough "$python" || fail "$("$python" --version) is too old: $newer"

# What the environment is made from; the stamp holds its checksum once all is installed.
checksum='import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
needed=$({ "$python" --version; cat requirements.txt pyproject.toml launch/setup.sh; } |
    "$python" -c "$checksum")
stamp=.venv/installed.sha256
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$needed" ] && exit 0

echo "Setting up .venv (once; a few minutes at most) ..." >&2
is_usable() {
    .venv/bin/python -m pip --version > /dev/null 2>&1 &&
        [ "$(.venv/bin/python --version)" = "$("$python" --version)" ]
}
if ! is_usable; then
    [ "$python" != .venv/bin/python ] ||
        fail ".venv has no pip: install it there, or set PYTHON=python3, which makes .venv anew"
    "$python" -m venv --clear .venv ||
        fail "$python cannot make a virtual environment: install its venv package (Debian: python3-venv)"
fi
install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" || fail \
        "pip could not install $*, see above: check the network (behind a mirror or proxy: PIP_INDEX_URL," \
        "HTTPS_PROXY) and the space on the disk, and run the same command again; where a package has no" \
        "build for $("$python" --version), set PYTHON=python3.11"
}
install -r requirements.txt
install --no-deps --editable .
echo "$needed" > "$stamp"
echo "Ready: source .venv/bin/activate" >&2
