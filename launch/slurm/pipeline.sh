#!/usr/bin/env bash
# The stages of a run as Slurm jobs, each started when the one before has succeeded:
#
#   bash launch/slurm/pipeline.sh SETTINGS                    all STAGES of the settings
#   bash launch/slurm/pipeline.sh SETTINGS train evaluate     these
#   bash launch/slurm/pipeline.sh --dry-run SETTINGS          check, and print what would be submitted
#
# SETTINGS is a copy of launch/slurm/settings.sh. Everything is checked before the first job is submitted.
# Jobs go back into the queue before their time is over, when other jobs take their nodes, and when they have
# lost a rank; where one fails, those after it are cancelled. After the mend, the same command continues:
# stages that are complete, with the same flags, are left out. Logs: RUN/slurm/STAGE-JOB.log
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started as `sh FILE`
set -euo pipefail
usage() { sed -n '2,12s/^# \{0,1\}//p' "$here/launch/slurm/pipeline.sh"; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

dry='' given=()
for word in "$@"; do
    case $word in
        --dry-run) dry=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "error: unknown option $word (see --help)" >&2; exit 2 ;;
        *) given+=("$word") ;;
    esac
done
[ ${#given[@]} -gt 0 ] || { usage >&2; exit 2; }
file=$(realpath -m -- "${given[0]}")
cd "$here"
source launch/slurm/read_settings.sh
read_settings "$file"
stages=("${given[@]:1}")
[ ${#stages[@]} -gt 0 ] || stages=(${STAGES[@]+"${STAGES[@]}"})
[ ${#stages[@]} -gt 0 ] || fail "$settings: STAGES is empty: name the stages, there or after the settings"
for command in sbatch srun scontrol squeue scancel; do
    command -v "$command" > /dev/null ||
        fail "there is no $command here: start this on a login node of the cluster"
done

# words_of STAGE DEPENDENCY...: sets `words`, those of sbatch
words_of() {
    local stage=$1
    local -n row="resources_$stage"
    words=(--job-name="$stage" "${row[@]}" --chdir="$here" --output="$RUN/slurm/%x-%j.log"
        --signal="B:USR1@$SECONDS_TO_SAVE" --kill-on-invalid-dep=yes
        ${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"} "${@:2}" "launch/slurm/$stage.sbatch" "$settings")
}

# remove_new_folders: the folder of the logs, and those above it, as far as they were made here and are empty
remove_new_folders() {
    local folder=$RUN/slurm
    while [ "$folder" != "$there" ] && rmdir -- "$folder" 2> /dev/null; do folder=${folder%/*}; done
}

# What the stages would do, one after another, as if those before had made their results.
made=() todo=()
for stage in "${stages[@]}"; do
    known_stage "$stage"
    declare -p "resources_$stage" > /dev/null 2>&1 || fail "$settings: there is no line: resources $stage …"
    said=$(bash "launch/slurm/$stage.sbatch" "$settings" check ${made[@]+"${made[@]}"}) || exit 2
    mark=${said%%$'\n'*} command=${said#*$'\n'}
    made+=("${mark%/*}")
    if [ ${#todo[@]} = 0 ] && [ -f "$mark" ] &&
        [ "$command" = "$(cat "$RUN/slurm/$stage.command" 2> /dev/null)" ]; then
        echo "$stage: complete, not submitted" >&2
    else
        todo+=("$stage")
    fi
done
[ ${#todo[@]} -gt 0 ] || { echo "every stage is complete: $RUN" >&2; exit 0; }

if [ -s "$RUN/slurm/jobs" ]; then # of the last time
    numbers=$(paste -sd, "$RUN/slurm/jobs")
    waiting=$(squeue --noheader --format='%A %j' --jobs="$numbers" 2> /dev/null) || waiting=''
    [ -z "$waiting" ] ||
        fail "jobs of this run are in the queue: ${waiting//$'\n'/, }; scancel them first, or wait"
fi
# The folder of the logs must be there before the jobs; --test-only wants no dependency and starts nothing.
there=$RUN/slurm
until [ -e "${there:-/}" ]; do there=${there%/*}; done
mkdir -p "$RUN/slurm" || fail "$settings: RUN=$RUN cannot be made a directory: choose another"
for stage in "${todo[@]}"; do
    words_of "$stage"
    said=$(sbatch --test-only "${words[@]}" 2>&1) || {
        remove_new_folders
        fail "Slurm does not take $stage: ${said//$'\n'/; } (see its line of resources, and SBATCH_FLAGS)"
    }
done

jobs=()
for stage in "${todo[@]}"; do
    words_of "$stage" ${jobs[@]+--dependency="afterok:${jobs[-1]}"}
    if [ -n "$dry" ]; then
        printf 'sbatch%s\n' "$(printf ' %q' "${words[@]}")"
        jobs+=("JOB_OF_${stage^^}")
        continue
    fi
    job=$(sbatch --parsable "${words[@]}") || {
        [ ${#jobs[@]} = 0 ] || scancel "${jobs[@]}"
        fail "$stage could not be submitted, see above; ${#jobs[@]} jobs before it were cancelled"
    }
    jobs+=("${job%%;*}")
    echo "$stage: job ${jobs[-1]}" >&2
done
if [ -n "$dry" ]; then
    remove_new_folders
else
    printf '%s\n' "${jobs[@]}" > "$RUN/slurm/jobs"
fi
