# Sourced by pipeline.sh and job.sh: read_settings FILE makes variables and tables of a file such as
# settings.sh, which they check; `fail` says what is wrong, and ends with 2.
# shellcheck shell=bash

fail() { echo "error: $*" >&2; exit 2; }

# known_stage STAGE: there is a file for it
known_stage() {
    [[ $1 =~ ^[a-z_]+$ ]] && [ -f "launch/slurm/$1.sbatch" ] || {
        local files=(launch/slurm/*.sbatch)
        files=("${files[@]##*/}")
        fail "$settings: there is no stage '$1'; the stages: ${files[*]%.sbatch}"
    }
}

# resources STAGE NODES TASKS CORES GPUS TIME: a row of the table; sets resources_STAGE, flags of sbatch
resources() {
    [ $# = 6 ] ||
        fail "$settings: resources $*: give stage, nodes, tasks a node, cores a task, GPUs a node, time"
    known_stage "$1"
    local number words=(nodes "tasks a node" "cores a task" "GPUs a node")
    for number in 2 3 4 5; do
        [[ ${!number} =~ ^(0|[1-9][0-9]*)$ ]] && [ "${!number}" -ge $((number < 5)) ] ||
            fail "$settings: resources $1: ${words[number - 2]}: '${!number}' is not a number of them"
    done
    [[ $6 =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] ||
        fail "$settings: resources $1: time: '$6' is not hours:minutes:seconds, such as 24:00:00"
    local -n row="resources_$1"
    row=(--nodes="$2" --ntasks-per-node="$3" --cpus-per-task="$4" --time="$6")
    [ "$5" = 0 ] || row+=(--gpus-per-node="$5")
}

# flags STAGE FLAGS...: sets flags_STAGE
flags() {
    known_stage "$1"
    local word
    for word in "${@:2}"; do
        [[ $word != --output && $word != --output=* ]] ||
            fail "$settings: flags $1: leave out --output: every stage writes below RUN, where the next one" \
                "reads"
    done
    local -n words="flags_$1"
    words=("${@:2}")
}

read_settings() {
    settings=$1
    [ -f "$settings" ] || fail "$settings is no file: copy launch/slurm/settings.sh, and give the copy"
    RUN='' BASE='' TEXT=() GENERAL=() TOKENIZER='' DS_CONFIG=ds_configs/zero2.json STAGES=() ENVIRONMENT=''
    SBATCH_FLAGS=() SRUN_FLAGS=() NETWORK='' SECONDS_TO_SAVE=300
    # Variables of ours that a loop in the settings might use.
    local stage=${stage:-} here=${here:-} dry=${dry:-} given=()
    # shellcheck disable=SC1090
    source "$settings" >&2 || fail "$settings could not be read by bash, see above"
    [ -n "$RUN" ] || fail "$settings: RUN is not set: the directory for all results, that all nodes share"
    [[ $SECONDS_TO_SAVE =~ ^[1-9][0-9]*$ ]] ||
        fail "$settings: SECONDS_TO_SAVE: '$SECONDS_TO_SAVE' is not a number of seconds"
    RUN=$(realpath -m -- "$RUN")
}
