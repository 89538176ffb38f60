#!/usr/bin/env bash
# Check all that needs a GPU, in 15 minutes: kernels, search, extraction, training, checkpoints, generation.
# Each step prints OK or FAIL with its figures and goals; the JSON has them all.
#   bash tools/gpu_check.sh --output gpu_check.json              one GPU
#   bash tools/gpu_check.sh --output gpu_check.json --gpus 8     then a rank on each of eight
#   bash tools/gpu_check.sh --output rehearsal.json --rehearse   no GPU: every command line, tiny sizes
#   PYTHON=python3.11 bash tools/gpu_check.sh ...                an environment other than .venv
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started as `sh FILE`
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || command -v "$python" > /dev/null || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" -m mlpmem_ds.benchmarks.gpu_check "$@"
