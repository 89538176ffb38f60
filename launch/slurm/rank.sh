#!/usr/bin/env bash
# One rank: rank.sh FOLDER COMMAND... runs the command, and leaves its exit code in FOLDER/RANK.
trap : TERM USR1 # the command gets the signal too, and this shell waits for its end
folder=$1
shift
"$@"
code=$?
echo "$code" > "$folder/$SLURM_PROCID"
[ "$code" = 0 ] || echo "rank $SLURM_PROCID on $(hostname): ended with code $code" >&2
exit "$code"
