#!/usr/bin/env bash
# Set up if needed, check style and types, run the tests. Arguments go to pytest:
#   bash tests/run.sh tests/maths -k loss
#   --no-setup as the first argument uses the active environment; -n 0 among pytest's arguments runs one test
#   at a time (for --pdb).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started as `sh FILE`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=.venv/bin/
if [ "${1:-}" = "--no-setup" ]; then
    bin=""
    shift
else
    bash launch/setup.sh
    export PATH="$PWD/.venv/bin:$PATH"
fi
# Two cores and two ranks: one thread each, or they get in each other's way tenfold.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
"${bin}ruff" check mlpmem_ds tools launch tests
"${bin}ruff" format --check mlpmem_ds tools launch tests
# The types beside the tests: the checker has one thread.
types=$(mktemp)
"${bin}mypy" > "$types" 2>&1 &
checker=$!
trap 'kill $(jobs -p) 2> /dev/null || true; rm -f "$types"' EXIT
# A file of tests stays together: its fixtures are costly. tests/conftest.py puts the long ones first.
workers=()
if "${bin}python" -c 'import xdist' 2>/dev/null; then
    cores=$("${bin}python" -c 'import os; print(len(os.sched_getaffinity(0)))')
    workers=(-n $((cores < 4 ? cores : 4)) --dist loadfile --no-loadscope-reorder)
fi
status=0
"${bin}python" -m pytest ${workers[@]+"${workers[@]}"} "$@" || status=$?
wait $checker || status=1
cat "$types"
exit $status
