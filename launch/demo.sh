#!/usr/bin/env bash
# The whole pipeline on real text: set up, prepare, train a base, extract keys, index, targets, memory,
# controls, evaluate, convert, generate. Prints a table at the end. Interrupted, the same command continues.
#
#   bash launch/demo.sh                             the source of Python's own library, about 10 minutes
#   bash launch/demo.sh --corpus PATH... --base NAME_OR_DIR --run DIR --ranks N
#
#   --corpus PATH...   text, Markdown, source or JSON lines: files or directories (default: Python's library)
#   --base MODEL       a causal LM, directory or Hub name (default: a small GPT-2 trained here on the corpus)
#   --run DIR          where everything goes (default: runs/demo)
#   --ranks N          processes of each stage (default: 2; 1 on a machine with one GPU)
#   --max-bytes N      text to use at most (default: 1e6 bytes of Python's library, all of --corpus)
#   --seed N           of the hashes that deal documents to splits (default: 0)
#   --no-setup         use the active environment instead of .venv
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started as `sh FILE`
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/options.sh" # reads the options; `shared` and `trained` start the ranks

say "1/9 corpus: text to tokens"
which_files=()
if [ ${#corpus[@]} = 0 ]; then
    corpus=("$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')")
    which_files=(--include '*.py' --exclude site-packages dist-packages test tests idle_test
        encodings pydoc_data lib2to3 idlelib turtledemo)
    max_bytes=${max_bytes:-1e6}
fi
python tools/prepare_corpus.py --input "${corpus[@]}" ${which_files[@]+"${which_files[@]}"} \
    --tokenizer "${base:-train:4096}" --output "$run/corpus" --block-size 256 --stride 256 \
    --tuning-fraction .06 --test-fraction .09 --heldout-fraction .07 \
    --seed "$seed" --max-bytes "${max_bytes:-none}"

if [ -z "$base" ]; then
    say "2/9 base: a small GPT-2 from scratch, to its best tuning perplexity"
    shared tools/train_base.py --corpus "$run/corpus" --output "$run/base"
    base=$run/base
fi

say "3/9 keys: the base's hidden states"
shared tools/extract_keys.py --model "$base" --corpus "$run/corpus" --output "$run/keys" \
    --unit-positions 16384

say "4/9 index: sharded IVF-PQ"
shared tools/build_index.py --keys "$run/keys" --output "$run/index" --num-shards 2

say "5/9 targets: each key's neighbours in other documents, as a distribution"
shared tools/write_targets.py --keys "$run/keys" --index "$run/index" --corpus "$run/corpus" \
    --k 1024 --neighbour-perplexity 250 --exclude same-document --shard-positions 32768 \
    --output "$run/targets"

say "6/9 memory: imitates the retriever (DeepSpeed ZeRO-3)"
memory_flags=(--ds_config ds_configs/zero3.json --corpus "$run/corpus" --keys "$run/keys"
    --targets "$run/targets" --model "$base" --head base --num-blocks 4
    --epochs 5 --learning-rate 2e-3 --batch-positions 2048
    --ce-through mixture --mixture-lambda .25 --validation-positions 8192)
trained launch/train.py "${memory_flags[@]}" --alpha .5 --output "$run/memory"

say "7/9 controls: a memory without the retriever, and the base trained on for as long"
shared launch/train.py "${memory_flags[@]}" --alpha 0 --output "$run/memory_ce_only"
spent=$(seconds_of keys index targets memory)
say "      the memory's own pipeline took $spent s; the base gets as many"
[ -f "$run/control_seconds" ] || echo "$spent" > "$run/control_seconds"
shared tools/train_baseline.py --kind continued --model "$base" \
    --corpus "$run/corpus" --output "$run/base_trained_on" --validate-every epoch \
    --time-budget-seconds "$(cat "$run/control_seconds")" --schedule constant --learning-rate 3e-4 \
    --warmup-fraction .0005 --early-stopping-patience none --select best --epochs 1000

say "8/9 evaluation"
shared launch/evaluate.py --model "$base" --corpus "$run/corpus" \
    --keys "$run/keys" --index "$run/index" --targets "$run/targets" --memory "$run/memory" \
    --control base+memory_ce_only="$run/memory_ce_only" base_trained_on="$run/base_trained_on" \
    --extra-splits heldout --k 1024 --output "$run/report"

say "9/9 Hugging Face model, and a sample of text"
python tools/convert_checkpoint.py --checkpoint "$run/memory" --model "$base" --report "$run/report" \
    --output "$run/export"
python launch/generate.py --model "$run/export" --prompt "def read(self, " --max-new-tokens 40 --compare

python tools/inspect_run.py "$run" --no-checksums
say "done; the report: $run/report/report.md, with its plots; the model: $run/export"
