# Sourced by pretrain.sh and pretrain_cont.sh: what the two share. Runs in bash 3.2.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# The comment at the head of a script is its help.
print_help() {
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$1"
}

# launch pretrain|continue [demo|2b|5b|FILE.yaml] [train.py flags]
launch() {
    local command=$1 plan word
    shift
    for word in "$@"; do
        case $word in
            -h | --help)
                print_help "$0"
                exit 0
                ;;
        esac
    done
    # A file is looked for where the caller stands; everything else is relative to the project.
    if [ -f "${1:-}" ] && [ "$(pwd -P)" != "$root" ]; then
        word=$(cd "$(dirname "$1")" && pwd -P)/$(basename "$1")
        shift
        set -- "$word" "$@"
    fi
    cd "$root"
    ./scripts/bootstrap.sh
    plan=$(.venv/bin/python -m moai.training.launch "$command" "$@")
    eval "$plan" # NUM_GPUS, launcher and flags, quoted for the shell
    export NUM_GPUS
    if [ -f optimize_env.sh ]; then
        . ./optimize_env.sh
    fi
    # exec, so that a signal to this script is a signal to the launcher, which ends every rank.
    exec "${launcher[@]}" train.py "${flags[@]}"
}
