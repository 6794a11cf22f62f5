# Sourced, never executed: sets thread, allocator and DATASET_* variables to what this process may use on this machine.
#
#     source optimize_env.sh          (bash 3.2 or newer, zsh, ksh; in plain sh from this directory: . ./optimize_env.sh)
#
# A variable that is already set, exported or not, even to nothing, stays as it is. Nothing else of the calling shell changes:
# everything runs in a subshell that prints the exports, and they are evaluated only where the variable is unset.

_moai_optimize_env() (
    set +eu 2>/dev/null
    unset CDPATH
    \cd "${1:-.}" >/dev/null 2>&1 || printf '%s\n' "optimize_env.sh: cannot enter $1" >&2

    # Variables that are set but not exported have to be seen below too.
    for name in TOKENIZERS_PARALLELISM RAYON_NUM_THREADS OMP_NUM_THREADS DATASET_NUM_PROC DATASET_BATCH_SIZE DATASET_WRITER_BATCH_SIZE \
        ARROW_DEFAULT_MEMORY_POOL ARROW_IO_THREADS NUM_GPUS NPROC_PER_NODE LOCAL_WORLD_SIZE CUDA_VISIBLE_DEVICES SLURM_CPUS_PER_TASK; do
        eval "[ -n \"\${$name+set}\" ]" && export "$name"
    done

    found=""
    for python in .venv/bin/python python3.11 python3; do
        found=$(PYTHONPATH=. "$python" -m moai.core.resources --summary --exports 2>/dev/null) && [ -n "$found" ] && break
        found=""
    done

    if [ -z "$found" ]; then
        cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null)
        [ "${cores:-0}" -gt 0 ] 2>/dev/null || cores=1
        ranks=${NUM_GPUS:-${NPROC_PER_NODE:-${LOCAL_WORLD_SIZE:-1}}}
        [ "$ranks" -gt 0 ] 2>/dev/null || ranks=1
        share=$((cores / ranks))
        [ "$share" -gt 0 ] || share=1
        found="$cores cores (getconf: no Python 3.11 with moai ran here, so limits of containers and Slurm and the RAM are not seen)
export TOKENIZERS_PARALLELISM=true
export RAYON_NUM_THREADS=$cores
export OMP_NUM_THREADS=$share
export DATASET_NUM_PROC=$cores
export DATASET_BATCH_SIZE=1000
export DATASET_WRITER_BATCH_SIZE=10000
export ARROW_DEFAULT_MEMORY_POOL=mimalloc
export ARROW_IO_THREADS=$((cores < 16 ? cores : 16))"
    fi

    machine="" assigned="" kept=""
    while IFS= read -r line; do
        line=${line%%  \#*}
        if [ -z "$machine" ]; then
            machine=$line
            continue
        fi
        assignment=${line#export }
        name=${assignment%%=*}
        if eval "[ -z \"\${$name+set}\" ]"; then
            printf '%s\n' "$line"
            assigned="$assigned $assignment"
        fi
    done <<LINES
$found
LINES
    for name in TOKENIZERS_PARALLELISM RAYON_NUM_THREADS OMP_NUM_THREADS DATASET_NUM_PROC DATASET_BATCH_SIZE DATASET_WRITER_BATCH_SIZE \
        ARROW_DEFAULT_MEMORY_POOL ARROW_IO_THREADS; do
        eval "[ -n \"\${$name+set}\" ]" && kept="$kept $name"
    done

    # The texts hold no single quote: they are ours, and of the user's variables only the names appear.
    printf "printf '%%s\\\\n' '%s'\n" \
        "✅ moai environment set:${assigned:- nothing, all were set already}${kept:+ (kept as you set them:$kept)}" \
        "   This machine: $machine" \
        "   To override, export a variable before sourcing this file, e.g. export DATASET_NUM_PROC=4"
)

# Where this file lies: every shell says so in its own way, and the others could not even parse it.
if [ -n "${BASH_VERSION:-}" ]; then
    if [ "${BASH_SOURCE:-}" = "$0" ]; then
        printf '%s\n' "optimize_env.sh was executed, so nothing it sets survives. Source it: source optimize_env.sh" >&2
    fi
    eval "$(_moai_optimize_env "$(dirname -- "${BASH_SOURCE:-./optimize_env.sh}")")"
elif [ -n "${ZSH_VERSION:-}" ]; then
    eval 'eval "$(_moai_optimize_env "${${(%):-%x}:A:h}")"'
elif [ -n "${KSH_VERSION:-}" ]; then
    eval 'eval "$(_moai_optimize_env "$(dirname -- "${.sh.file}")")"'
else
    eval "$(_moai_optimize_env .)"
fi
unset -f _moai_optimize_env
