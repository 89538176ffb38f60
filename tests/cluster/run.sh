#!/usr/bin/env bash
# Rehearse a cluster: several hosts on this machine (network namespaces), each launcher, cut cables, kills.
#   bash tests/cluster/run.sh            everything, about 12 minutes on two idle cores
#   bash tests/cluster/run.sh --quick    one launcher, a cut and a kill: about 2 minutes
#   --no-setup as the first argument uses the active environment; other arguments go to pytest.
# As root, where namespaces are allowed; elsewhere every test is skipped with the reason.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started as `sh FILE`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ "${1:-}" = "--no-setup" ]; then
    shift
else
    bash launch/setup.sh
    export PATH="$PWD/.venv/bin:$PATH"
    # An S3 server for the tests of object stores.
    [ "${1:-}" = "--quick" ] || python -c 'import moto, s3fs' 2> /dev/null ||
        python -m pip install --quiet --disable-pip-version-check -r tests/cluster/requirements-s3.txt ||
        echo "no S3 server: its tests are skipped" >&2
fi
which=(-m cluster)
if [ "${1:-}" = "--quick" ]; then
    shift
    which=(-m "cluster and quick")
elif [ -z "${MLPMEM_SLURM:-}" ] && ! command -v slurmctld > /dev/null; then
    # Slurm's packages, unpacked and not installed; where they cannot be had, its tests say so.
    export MLPMEM_SLURM=${XDG_CACHE_HOME:-$HOME/.cache}/mlpmem-slurm
    bash tests/cluster/fetch_slurm.sh "$MLPMEM_SLURM" || unset MLPMEM_SLURM
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
exec python -m pytest -n 0 "${which[@]}" tests/cluster "$@"
