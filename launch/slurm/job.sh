# Sourced by the files of the stages, with SETTINGS: reads the settings, defines `needs`, `makes`, `together`
# and `apart`. With SETTINGS check DIRECTORY... nothing runs: what the stage would do is checked, as if the
# stages before it had made these directories, and its result and command are written to standard output.
# shellcheck shell=bash
set -euo pipefail
source launch/slurm/read_settings.sh
read_settings "$1"
is_check=${2:-}
made=("${@:3}")
mark=''

set +u # of scripts that others wrote; what they say is not the result of a check
eval "$ENVIRONMENT" >&2 || fail "$settings: ENVIRONMENT='$ENVIRONMENT' failed, see above"
set -u

# is_there DIRECTORY: it exists, or a stage before this one makes it
is_there() {
    local directory path
    path=$(realpath -m -- "$1") # settings may name it through a link, or from here
    for directory in ${made[@]+"${made[@]}"}; do
        [ "$(realpath -m -- "$directory")" != "$path" ] || return 0
    done
    [ -e "$1" ]
}

# needs DIRECTORY: of another stage
needs() {
    [ -z "$is_check" ] || is_there "$1" ||
        fail "$settings: $stage reads $1, which does not exist, and no stage before it makes it: put the" \
            "stage that does into STAGES, or set RUN to the directory that has it"
}

# makes DIRECTORY [FILE]: of this stage, complete where it holds this file
makes() { mark=$1/${2:-manifest.json}; }

# requires NAME VALUES...: a setting of files and directories, not empty; they exist. URLs, patterns, packages
# (docs:torch) and data sets (datasets:NAME) are left to the stage.
requires() {
    [ -n "$is_check" ] || return 0
    local value elsewhere='^(docs|datasets):|^[a-z][a-z0-9+.-]+:/|[*?[]'
    [ $# -gt 1 ] && [ -n "$2" ] || fail "$settings: $1 is not set, and $stage needs it"
    for value in "${@:2}"; do
        [[ $value =~ $elsewhere ]] || is_there "$value" || fail "$settings: $1: $value does not exist"
    done
}

# requires_model NAME VALUE: a setting of a directory, or of a name, which does not begin as a path
requires_model() { [[ $2 == [^./~]* ]] || requires "$@"; }

# needs_base: a directory, or a name that the nodes find without the Hub
needs_base() {
    requires_model BASE "$BASE"
    [ -z "$is_check" ] || is_there "$BASE" || [ "${HF_HUB_OFFLINE:-1}" = 0 ] || python -c '
import sys
from huggingface_hub import try_to_load_from_cache
try:
    sys.exit(not isinstance(try_to_load_from_cache(sys.argv[1], "config.json"), str))
except ValueError:
    sys.exit(1)' "$BASE" || fail "$settings: BASE=$BASE is no directory, and no model in the cache of the" \
        "Hub, and nodes do not ask the Hub: give a directory, fetch it here first, or export HF_HUB_OFFLINE=0"
}

# together FRONT_END FLAGS...: ranks that are connected; one that is lost ends the others
together() { run_stage 1 "$@"; }

# apart FRONT_END FLAGS...: ranks that share the files alone; what a lost one leaves, the others do
apart() { run_stage 0 "$@"; }

run_stage() {
    local kill=$1 front_end=$2
    local -n more="flags_$stage"
    local words=("${@:3}" ${more[@]+"${more[@]}"})
    if [ -n "$is_check" ]; then
        local name=${front_end##*/}
        python -m mlpmem_ds --check "${name%.py}" "${words[@]}" ||
            fail "$settings: these flags of $stage are not right, see above"
        printf '%s\n%s\n' "$mark" "$(printf ' %q' "$front_end" "${words[@]}")"
        return
    fi
    mkdir -p "$RUN/slurm"
    # Once its ranks have ended well it is the command of a complete stage, which pipeline.sh leaves out.
    started=$RUN/slurm/$stage.started
    printf ' %q' "$front_end" "${words[@]}" > "$started"
    rm -f "$RUN/slurm/$stage.command"
    codes=$RUN/slurm/$stage.codes
    rm -rf "$codes" && mkdir "$codes"
    set_environment "$kill"
    echo "$stage: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST," \
        "$(date '+%F %T')"
    # Before the time is over, and before another job takes the nodes, this shell is told. The ranks save
    # what can be saved at SIGTERM, and end.
    asked=''
    trap 'asked=1; scancel --quiet --signal=TERM "$SLURM_JOB_ID"' USR1
    # srun of Slurm 22.05 to 23.10 does not take the job's --cpus-per-task: a rank would have one core.
    srun --kill-on-bad-exit="$kill" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        ${SRUN_FLAGS[@]+"${SRUN_FLAGS[@]}"} \
        bash launch/slurm/rank.sh "$codes" python "$front_end" "${words[@]}" &
    local code=0
    wait $! || code=$?
    if [ -n "$asked" ]; then # `wait` ended with the signal, not with srun
        code=0
        wait $! || code=$?
    fi
    end_stage "$code"
}

# set_environment CONNECTED: variables of the ranks; those of another launcher, which sbatch took along, go
set_environment() {
    unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
    export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
    source launch/env.sh
    [ "$1" = 1 ] || return 0
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${MASTER_ADDR%%$'\n'*} # no pipe to head: it would close it while scontrol writes
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 20000))
}

# end_stage CODE_OF_SRUN: done, failed, or back into the queue. srun's code is the highest of all ranks', and
# it ends the ranks that are left with SIGTERM (143), so the ranks' own codes say more.
end_stage() {
    local code=$1 number all=0 ended_well=0 failed='' lost=0
    for number in $(cat "$codes"/* 2> /dev/null); do
        all=$((all + 1))
        case $number in
            0) ended_well=$((ended_well + 1)) ;;
            138 | 143) ;; # stopped: USR1, TERM
            75 | 1[3-9][0-9]) lost=$((lost + 1)) ;; # it lost another rank, or was killed by a signal
            *) failed=${failed:-$number} ;;
        esac
    done
    [ "$all" = "$SLURM_NTASKS" ] || lost=$((lost + SLURM_NTASKS - all))
    rm -rf "$codes"
    if [ -z "$failed" ] && is_complete "$ended_well"; then
        mv "$started" "$RUN/slurm/$stage.command"
        [ "$lost" = 0 ] || echo "$stage: $lost of $SLURM_NTASKS ranks were lost, the others did their work"
        rm -f "$RUN/slurm/$stage.deaths" "$RUN/slurm/$stage.idle"
        echo "$stage: complete, $mark"
        exit 0
    fi
    ! has_news || rm -f "$RUN/slurm/$stage.idle"
    if [ "$lost" -gt 0 ] && [ -z "$asked" ]; then
        count_death
        requeue "ranks were lost"
    fi
    # A training that was asked to stop saves, and its ranks end with 0.
    [ -z "$asked" ] && [ -n "$failed" ] || {
        count_idle
        requeue "stopped before it was complete"
    }
    rm -f "$RUN/slurm/$stage.deaths" "$RUN/slurm/$stage.idle" # whoever submits it again has mended something
    echo "$stage: failed, code ${failed:-$code}; the log above says why. No later stage is started." >&2
    exit "${failed:-$code}"
}

# is_complete RANKS_THAT_ENDED_WELL: this start made the result, or had nothing to do. One from before it may
# be of other flags, and ranks that were killed or asked to stop do not say so.
is_complete() {
    [ -f "$mark" ] || return 1
    [ "$mark" -nt "$started" ] || { [ -z "$asked" ] && [ "$1" = "$SLURM_NTASKS" ]; }
}

# count_death: ends the job where it was the third of three short lives in a row
count_death() {
    local file=$RUN/slurm/$stage.deaths
    if [ "$SECONDS" -ge 600 ]; then
        rm -f "$file"
        return
    fi
    echo "$SECONDS s: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1))" >> "$file"
    [ "$(wc -l < "$file")" -lt 3 ] || {
        rm -f "$file"
        fail "$stage lost ranks within ten minutes three times in a row: not started again. A rank that is" \
            "killed (137) often had too little memory"
    }
}

# has_news: this start made a unit or a whole checkpoint; the files of one that was not finished do not count
has_news() {
    local found
    found=$(cd "${mark%/*}" && find . -newer "$started" -type f \( -path '*/done/*.json' \
        -o -path './checkpoints/*/manifest.json' ! -path './checkpoints/*.tmp/*' \) -print -quit) \
        2> /dev/null || true
    [ -n "$found" ]
}

# was_early: the job was asked to stop within ten minutes, and not for its own time: for another job
was_early() {
    [ -n "$asked" ] && [ "$SECONDS" -lt 600 ] || return 1
    # Slurm sends its signal up to a minute early.
    [ -z "${SLURM_JOB_END_TIME:-}" ] ||
        [ $((SLURM_JOB_END_TIME - $(date +%s))) -gt $((SECONDS_TO_SAVE + 60)) ]
}

# count_idle: ends the job where it was the third start that stopped without an error since there was
# something new. One that left early for another job does not count.
count_idle() {
    local file=$RUN/slurm/$stage.idle
    ! has_news && ! was_early || return 0
    echo "$SECONDS s: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1))" >> "$file"
    [ "$(wc -l < "$file")" -lt 3 ] || {
        rm -f "$file"
        fail "$stage stopped three times without an error, with no new unit and no new checkpoint in" \
            "between, and did not make $mark: not started again. Read the log above; where its time was" \
            "over, give it more in the line of resources"
    }
}

requeue() {
    local state
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2> /dev/null) || state=''
    [ "$state" = RUNNING ] || {
        echo "$stage: $1; its job is ${state:-over}, and not queued again"
        exit 143
    }
    echo "$stage: $1; its job goes back into the queue, and continues"
    scontrol requeue "$SLURM_JOB_ID" ||
        fail "$stage: the job could not be queued again: submit the pipeline again"
    exit 0
}
