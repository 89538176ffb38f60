#!/usr/bin/env bash
# The whole pipeline on real text: set up, prepare, train a base, extract keys, index, targets, memory, controls,
# evaluate, convert, generate. Prints a table at the end. Interrupted, the same command continues where it was.
#
#   bash launch/demo.sh                                     the Python standard library's own source, about 10 minutes
#   bash launch/demo.sh --corpus PATH... --base NAME_OR_DIR --run DIR --ranks N
#
#   --corpus PATH...   text, Markdown, source or JSON lines: files or directories (default: the standard library)
#   --base MODEL       a causal LM, directory or Hub name (default: a small GPT-2 trained here on the corpus)
#   --run DIR          where everything goes (default: runs/demo)
#   --ranks N          processes of each stage (default: 2; 1 on a machine with one GPU)
#   --max-bytes N      text to use at most (default: 1e6 bytes of the standard library, all of --corpus)
#   --seed N           of the hashes that deal documents to splits (default: 0)
#   --no-setup         use the active environment instead of .venv
set -euo pipefail
cd_to=$(dirname "${BASH_SOURCE[0]}")/..
usage() { sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() { echo "error: $1" >&2; exit 2; }

corpus=() base="" run="" ranks="" setup=1 max_bytes="" seed=0
while [ $# -gt 0 ]; do
    case $1 in
        --corpus) shift; [ $# -gt 0 ] && [[ $1 != --* ]] || fail "--corpus needs a path"; while [ $# -gt 0 ] && [[ $1 != --* ]]; do corpus+=("$(realpath -m -- "$1")"); shift; done ;;
        --base) [ $# -ge 2 ] || fail "--base needs a value"; if [ -e "$2" ]; then base=$(realpath -- "$2"); else base=$2; fi; shift 2 ;;
        --run) [ $# -ge 2 ] || fail "--run needs a value"; run=$(realpath -m -- "$2"); shift 2 ;;
        --ranks) [ $# -ge 2 ] || fail "--ranks needs a value"; ranks=$2; shift 2 ;;
        --max-bytes) [ $# -ge 2 ] || fail "--max-bytes needs a value"; max_bytes=$2; shift 2 ;;
        --seed) [ $# -ge 2 ] || fail "--seed needs a value"; seed=$2; shift 2 ;;
        --no-setup) setup=0; shift ;;
        -h|--help) usage; exit 0 ;;
        *) fail "unknown option $1 (see --help)" ;;
    esac
done
[[ $ranks =~ ^([1-9][0-9]*)?$ ]] || fail "--ranks $ranks is not a number of processes"
for path in ${corpus[@]+"${corpus[@]}"}; do [ -e "$path" ] || fail "--corpus $path does not exist"; done
cd "$cd_to"
[ -n "$run" ] || run=$PWD/runs/demo
if [ $setup = 1 ]; then
    bash launch/setup.sh
    export PATH="$PWD/.venv/bin:$PATH"
fi
look='import os, torch, mlpmem_ds, deepspeed, faiss
print(torch.cuda.device_count() if torch.cuda.is_available() else 0, len(os.sched_getaffinity(0)))'
found=$(cd / && python -c "$look" 2>/dev/null | tail -n 1) ||
    fail "mlpmem_ds is not installed in this environment: leave out --no-setup, or pip install -e ."
read -r gpus cores <<< "$found"
started=$SECONDS
{ [ ! -e "$run" ] || [ -d "$run" ]; } && mkdir -p "$run" 2>/dev/null || fail "--run $run cannot be made a directory: choose another"
trap 'rmdir -- "$run" 2>/dev/null || true' EXIT  # where nothing came of it

# Two processes on a CPU; on a GPU machine as many as there are GPUs, two at most.
[ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu
if [ -z "$ranks" ]; then ranks=2; [ "$gpus" != 1 ] || ranks=1; fi

# One thread a rank where the ranks fill the cores; every process that torch starts sees this.
threads=$(( cores / ranks )); [ "$threads" -ge 1 ] || threads=1
export OMP_NUM_THREADS=$threads TOKENIZERS_PARALLELISM=true PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

say() { printf '\n[%3d s] %s\n' $((SECONDS - started)) "$*"; }
shared() { if [ "$ranks" = 1 ]; then python "$@"; else torchrun --standalone --nproc-per-node "$ranks" "$@"; fi; }
# The memory is started as on a cluster. Under torchrun the controls train in the same way, and start and end 5 s sooner.
trained() { if [ "$ranks" = 1 ]; then python "$@"; else deepspeed -q --master_port "$port" --num_accelerators "$ranks" "$@"; fi; }

say "1/9 corpus: text to tokens"
exclude=()
if [ ${#corpus[@]} = 0 ]; then
    corpus=("$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')")
    exclude=(--include '*.py' --exclude site-packages dist-packages test tests idle_test encodings pydoc_data lib2to3 idlelib turtledemo)
    max_bytes=${max_bytes:-1e6}
fi
if [ -n "$base" ]; then tokenizer=$base; else tokenizer=train:4096; fi
python tools/prepare_corpus.py --input "${corpus[@]}" ${exclude[@]+"${exclude[@]}"} --tokenizer "$tokenizer" --output "$run/corpus" \
    --block-size 256 --stride 256 --tuning-fraction .06 --test-fraction .09 --heldout-fraction .07 --seed "$seed" --max-bytes "${max_bytes:-0}"

if [ -z "$base" ]; then
    say "2/9 base: a small GPT-2 from scratch, to its best tuning perplexity"
    shared tools/train_base.py --corpus "$run/corpus" --output "$run/base"
    base=$run/base
fi

say "3/9 keys: the base's hidden states"
shared tools/extract_keys.py --unit-positions 16384 --model "$base" --corpus "$run/corpus" --output "$run/keys"

say "4/9 index: sharded IVF-PQ"
shared tools/build_index.py --keys "$run/keys" --output "$run/index" --num-shards 2

say "5/9 targets: each key's neighbours in other documents, as a distribution"
shared tools/write_targets.py --keys "$run/keys" --index "$run/index" --corpus "$run/corpus" --output "$run/targets" \
    --k 1024 --neighbour-perplexity 250 --exclude same-document --shard-positions 32768

memory_flags=(--ds_config ds_configs/zero3.json --corpus "$run/corpus" --keys "$run/keys" --targets "$run/targets" --model "$base" --head base
              --num-blocks 4 --epochs 5 --learning-rate 2e-3 --batch-positions 2048 --ce-through mixture --mixture-lambda .25 --validation-positions 8192)
say "6/9 memory: imitates the retriever (DeepSpeed ZeRO-3)"
trained launch/train.py "${memory_flags[@]}" --alpha .5 --output "$run/memory"

say "7/9 controls: a memory without the retriever, and the base trained on for as long"
shared launch/train.py "${memory_flags[@]}" --alpha 0 --output "$run/memory_ce_only"
spent=$(python -c '
import sys
from pathlib import Path
from mlpmem_ds.core.log import seconds_of_stage
print(round(sum(seconds_of_stage(Path(sys.argv[1]) / stage) or 0 for stage in ("keys", "index", "targets", "memory"))))' "$run")
say "      the memory's own pipeline took $spent s; the base gets as many"
[ -f "$run/control_seconds" ] || echo "$spent" > "$run/control_seconds"
shared tools/train_base.py --corpus "$run/corpus" --output "$run/base_trained_on" --init-from "$base" \
    --time-budget "$(cat "$run/control_seconds")" --schedule constant --learning-rate 3e-4 --warmup-fraction .0005 --early-stopping-patience 0 --epochs 1000

say "8/9 evaluation"
shared launch/evaluate.py --model "$base" --corpus "$run/corpus" --keys "$run/keys" --index "$run/index" --targets "$run/targets" \
    --memory "$run/memory" --control base+memory_ce_only="$run/memory_ce_only" base_trained_on="$run/base_trained_on" \
    --extra-splits heldout --k 1024 --output "$run/report"

say "9/9 Hugging Face model, and a sample of text"
python tools/convert_checkpoint.py --checkpoint "$run/memory" --model "$base" --report "$run/report" --output "$run/export"
python launch/generate.py --model "$run/export" --prompt "def read(self, " --max-new-tokens 40 --compare

python tools/inspect_run.py "$run" --no-checksums
say "done; the report: $run/report/report.md, its plots beside it; the model: $run/export"
