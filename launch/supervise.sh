#!/usr/bin/env bash
# Run a command, and run it again whenever it dies of a signal, of a lost rank or of a fault: it continues.
#
#   bash launch/supervise.sh torchrun --standalone --nproc-per-node 8 launch/train.py FLAGS...
#   srun --kill-on-bad-exit=0 bash launch/supervise.sh python tools/write_targets.py --exchange none ...
#
# The first starts all ranks again when one has died. The second has a supervisor for each rank: where
# the ranks are not connected (--exchange none), one that has died starts again and the others go on.
#
# Not run again: exit code 0 (done, or saved as asked), 2 (yours to mend; also where the launcher makes
# another code of a rank's 2), 130 and 143 (Ctrl-C, SIGTERM), after a signal that the supervisor was sent,
# and after too many rapid deaths. Signals are passed on to the command. Before a new start, and at the
# end, nothing that the command has started on this host is left running.
#
#   --rapid-seconds N   a life shorter than this is a rapid death (default: 60)
#   --max-rapid N       give up after so many rapid deaths in a row (default: 5)
#   --grace-seconds N   time that what is left of a command has to end by itself (default: 30; after a
#                       signal to the supervisor 300, for a training saves)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started as `sh FILE`
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
say() { echo "supervise: $*" >&2; }

rapid_seconds=60 max_rapid=5 grace_seconds=30 stop_seconds=300
while [ $# -gt 0 ]; do
    case $1 in
        --rapid-seconds | --max-rapid | --grace-seconds)
            [[ ${2:-} =~ ^[0-9]{1,9}$ ]] || fail "$1 ${2:-} is not a whole number of up to nine digits"
            number=$((10#$2)) # bash takes 08 for octal
            case $1 in
                --rapid-seconds) rapid_seconds=$number ;;
                --max-rapid) max_rapid=$number ;;
                --grace-seconds) grace_seconds=$number stop_seconds=$number ;;
            esac
            shift 2
            ;;
        -h | --help) sed -n '2,/^\[/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) fail "unknown option $1 (see --help); the command and its flags come last" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || fail "no command is given (see --help)"
command -v -- "$1" > /dev/null || fail "there is no command $1"

# A rank whose exit code is 2 leaves its message here, for a launcher may end with another code.
refused=$(mktemp)
trap 'rm -f -- "$refused"' EXIT
# All that the command starts has this variable, in any session and after any death of its parent.
mark=MLPMEM_SUPERVISOR=$$-$RANDOM$RANDOM
# Where the supervisor itself is killed, the command is told to end.
tied=()
! setpriv --pdeathsig TERM true 2> /dev/null || tied=(setpriv --pdeathsig TERM --)

# The processes that are left of the command.
left() {
    grep -lzxF -- "$mark" /proc/[0-9]*/environ 2> /dev/null | sed 's,/proc/\(.*\)/environ,\1,' || true
}

# Those of them that have a handler for this signal.
handlers_of() {
    local pid mask
    for pid in $(left); do
        mask=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$pid/status" 2> /dev/null) || true
        (((0x${mask:-0} >> ($(kill -l "$1") - 1)) & 1)) && echo "$pid"
    done
    return 0
}

# INT, TERM, HUP and QUIT go to the command, which passes them on to its ranks. Launchers die of USR1, which
# asks a training to save and end: it goes to the ranks; where none knows it yet, the command gets TERM.
child="" asked="" interrupted=""
pass_on() {
    local name=$1 pids=$child
    asked=$1 interrupted=1
    [ -n "$child" ] || return 0
    if [[ $name == USR? ]]; then
        pids=$(handlers_of "$name")
        [ -n "$pids" ] || name=TERM pids=$child
    fi
    # shellcheck disable=SC2086  # a number each
    kill -s "$name" $pids 2> /dev/null || true
}
for name in HUP INT QUIT TERM USR1 USR2; do
    # shellcheck disable=SC2064  # the name of now
    trap "pass_on $name" "$name"
done

# The command's exit code, however often a signal interrupts the waiting.
await() {
    local code now
    code=0
    while :; do
        interrupted="" now=0
        { wait "$child" || now=$?; } 2> /dev/null  # bash would say `Killed`, with all of the command
        [ "$now" = 127 ] && [ "$code" != 0 ] || code=$now  # 127: its end had been told with the signal
        [ -n "$interrupted" ] || break
    done
    return "$code"
}

# Let them end within so many seconds; then tell them to, then kill them.
end_what_is_left() {
    local pids name deadline=$((SECONDS + $1))
    for name in wait TERM KILL; do
        pids=$(left)
        [ -n "$pids" ] || return 0
        # shellcheck disable=SC2086  # a number each
        [ "$name" = wait ] || kill -s "$name" $pids 2> /dev/null || true
        while [ -n "$(left)" ] && [ $SECONDS -lt $deadline ]; do sleep 0.2; done
        deadline=$((SECONDS + grace_seconds))
    done
}

num_rapid=0
while :; do
    started=$SECONDS code=0
    set -m  # a process group of its own: Ctrl-C comes from here, once
    env -- "$mark" MLPMEM_REFUSED="$refused" ${tied[@]+"${tied[@]}"} "$@" &
    child=$!
    set +m
    [ -z "$asked" ] || pass_on "$asked"
    await || code=$?
    lived=$((SECONDS - started))
    if [ -n "$asked" ]; then
        end_what_is_left "$stop_seconds"  # the deepspeed command ends before its ranks have saved
        exit "$code"
    fi
    end_what_is_left 0
    [ "$code" = 0 ] || [ ! -s "$refused" ] || code=2
    case $code in 0 | 2 | 130 | 143) exit "$code" ;; esac
    if [ $lived -lt "$rapid_seconds" ]; then num_rapid=$((num_rapid + 1)); else num_rapid=0; fi
    if [ $num_rapid -gt 0 ] && [ $num_rapid -ge "$max_rapid" ]; then
        say "exit code $code after $lived s; so $num_rapid starts in a row have lived less than" \
            "$rapid_seconds s, and it is not started again: read what it wrote last"
        exit "$code"
    fi
    pause=$((num_rapid > 5 ? 32 : (1 << num_rapid) / 2))  # seconds; 1, 2, 4, … of rapid deaths in a row
    say "exit code $code after $lived s: starting it again in $pause s"
    sleep "$pause" &
    child=$!
    await || true
    [ -z "$asked" ] || exit $((128 + $(kill -l "$asked")))
done
