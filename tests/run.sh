#!/usr/bin/env bash
# Set up if needed, check style and types, run the tests. Arguments go to pytest: bash tests/run.sh tests/maths -k loss
#   --no-setup as the first argument uses the active environment.
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
"${bin}mypy"
exec "${bin}python" -m pytest "$@"
