# Sourced by demo.sh: reads its options, sets up the environment, chooses ranks and threads.
#   sets kind (whole, quick, pretrained), corpus, general and cut (arrays), base, wheel, run, ranks,
#   max_bytes, seed; defines say, finish, shared, trained, must_be_complete, has_splits, seconds_of
# shellcheck shell=bash
demo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/demo.sh
usage() { sed -n '2,26s/^# \{0,1\}//p' "$demo"; }
fail() { echo "error: $1" >&2; exit 2; }

corpus=() general=() cut=() base="" wheel="" run="" ranks="" setup=1 max_bytes="" seed=0 kind=whole
while [ $# -gt 0 ]; do
    option=$1
    shift
    case $option in
        --quick | --pretrained)
            [ "$kind" = whole ] || [ "$kind" = "${option#--}" ] ||
                fail "--quick and --pretrained are two demonstrations: choose one"
            kind=${option#--}
            ;;
        --corpus | --general)
            [ $# -gt 0 ] && [[ $1 != --* ]] || fail "$option needs a path"
            while [ $# -gt 0 ] && [[ $1 != --* ]]; do
                [ -n "$1" ] || fail "$option is empty: is a variable unset?"
                path=$1
                case $path in
                    docs:*) ;; # documentation that is installed, no path
                    *)
                        path=$(realpath -m -- "$path")
                        [ -e "$path" ] || fail "$option $path does not exist"
                        ;;
                esac
                if [ "$option" = --corpus ]; then corpus+=("$path"); else general+=("$path"); fi
                shift
            done
            ;;
        --base | --wheel | --run | --ranks | --max-bytes | --cut-documents | --seed)
            [ $# -ge 1 ] && [[ $1 != --* ]] || fail "$option needs a value"
            [ -n "$1" ] || fail "$option is empty: is a variable unset?"
            case $option in
                --wheel) wheel=$(realpath -m -- "$1") ;;
                --base) if [ -e "$1" ]; then base=$(realpath -- "$1"); else base=$1; fi ;;
                --run) run=$(realpath -m -- "$1") ;;
                --ranks) ranks=$1 ;;
                --max-bytes) max_bytes=$1 ;;
                --cut-documents) cut=("$option" "$1") ;;
                --seed) seed=$1 ;;
            esac
            shift
            ;;
        --no-setup) setup=0 ;;
        -h | --help) usage; exit 0 ;;
        *) fail "unknown option $option (see --help)" ;;
    esac
done
[[ $ranks =~ ^([1-9][0-9]*)?$ ]] || fail "--ranks $ranks is not a number of processes"
[ "$kind" = pretrained ] || [ -z "$wheel" ] || fail "--wheel is of --pretrained: give that too"
[ "$kind" = pretrained ] || [ ${#general[@]} = 0 ] || fail "--general is of --pretrained: give that too"
[ -z "$wheel" ] || [ -z "$base" ] || fail "--wheel and --base are two ways to give the base: choose one"
[ -z "$wheel" ] || [ -f "$wheel" ] || fail "--wheel $wheel does not exist"

cd "$(dirname "$demo")/.."
if [ -z "$run" ]; then
    run=$PWD/runs/demo
    [ "$kind" = whole ] || run=$PWD/runs/$kind
fi
if [ $setup = 1 ]; then
    bash launch/setup.sh
    export PATH="$PWD/.venv/bin:$PATH"
fi
look='import os, torch, mlpmem_ds, deepspeed, faiss
print(torch.cuda.device_count() if torch.cuda.is_available() else 0, len(os.sched_getaffinity(0)))'
machine=$(cd / && python -c "$look" 2>/dev/null | tail -n 1) ||
    fail "mlpmem_ds is not installed in this environment: leave out --no-setup, or pip install -e ."
read -r gpus cores <<< "$machine"
started=$SECONDS
{ [ ! -e "$run" ] || [ -d "$run" ]; } && mkdir -p "$run" 2>/dev/null ||
    fail "--run $run cannot be made a directory: choose another"
trap 'rmdir -- "$run" 2>/dev/null || true' EXIT  # where nothing was written

# Two processes on a CPU; on a GPU machine as many as there are GPUs, two at most.
[ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu
if [ -z "$ranks" ]; then
    ranks=2
    [ "$gpus" != 1 ] || ranks=1
fi
# One thread a rank where the ranks fill the cores; every process that torch starts sees this. Who has set a
# number keeps it: on a machine with other work, processes of several threads wait for each other.
threads=$(( cores / ranks ))
[ "$threads" -ge 1 ] || threads=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} TOKENIZERS_PARALLELISM=true
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

# say TEXT...: a heading with the seconds since the start
say() { printf '\n[%3d s] %s\n' $((SECONDS - started)) "$*"; }

# finish TEXT: the last heading, and what to do with the result
finish() {
    say "done; $1"
    [ $setup = 0 ] || echo "next, in $PWD: source .venv/bin/activate; then docs/quickstart.md"
}

# shared FILE FLAGS...: run a front-end on all ranks
shared() {
    if [ "$ranks" = 1 ]; then
        python "$@"
    else
        torchrun --standalone --nproc-per-node "$ranks" "$@"
    fi
}

# trained FILE FLAGS...: the same with DeepSpeed's launcher, as on a cluster (starts and ends 5 s later). It
# takes the machine's first GPUs, whichever CUDA_VISIBLE_DEVICES allows: where that is set, it is left out.
trained() {
    if [ "$ranks" = 1 ] || [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        shared "$@"
    else
        deepspeed -q --master_port "$port" --num_accelerators "$ranks" "$@"
    fi
}

# must_be_complete DIRECTORY: of a training; one that was stopped has saved, and its ranks have ended with 0,
# as has a launcher that was killed
must_be_complete() {
    [ -f "$1/manifest.json" ] && return
    echo "error: the training of $1 was stopped before its end: the same command continues" >&2
    exit 75
}

# has_splits CORPUS OPTION TOKENS: refuse a corpus with fewer tuning or test tokens: the last steps need them
has_splits() {
    local tokens
    tokens=$(python -c '
import sys
from pathlib import Path
from mlpmem_ds.formats.corpus import num_tokens_of_splits
tokens = num_tokens_of_splits(Path(sys.argv[1]))
print(min(tokens.get(split, 0) for split in ("tuning", "test")))' "$1")
    [ "$tokens" -ge "$3" ] || fail \
        "the splits tuning and test of $2 have fewer than $3 tokens: give more text, or with long documents\
 --cut-documents 4000, and another --run"
}

# seconds_of STAGE...: what these stages of the run have taken, over all starts
seconds_of() {
    python -c '
import sys
from pathlib import Path
from mlpmem_ds.core.log import seconds_of_stage
run, *stages = sys.argv[1:]
print(round(sum(seconds_of_stage(Path(run) / stage) or 0 for stage in stages)))' "$run" "$@"
}
