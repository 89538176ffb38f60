# Sourced on every host before the ranks are started there: networks, caches, threads. A variable that is set
# already stays. launch/slurm/ sources it; elsewhere: source launch/env.sh, then torchrun or mpirun.
# The `deepspeed` launcher carries to other hosts what stands in the file .deepspeed_env (NAME=value, a line
# each) and variables that begin with NCCL or PYTHON, and no others.
# shellcheck shell=bash

# A rank computes with so many threads. Unset, each rank starts one for every core of the host: eight ranks on
# 64 cores are 512 threads that wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# The network that joins the hosts, by the name that `ip address` shows (ib0, eth1). Unset, gloo takes the one
# that the host's own name leads to, which /etc/hosts may make the loopback, and NCCL the first that is no
# loopback, which may be the slow one of the administrators.
if [ -n "${NETWORK:-}" ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NETWORK}
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$NETWORK}
fi

# A connection that fails is written with host and reason; unset, NCCL says nothing.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Compiled kernels of Triton and of DeepSpeed, on the host's own disk: ranks of all hosts would write the same
# small files into one folder of the shared file system, and read them from there at each start.
caches=${TMPDIR:-/tmp}/mlpmem-$(id -u)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$caches/torch_extensions}

# Models come from a directory or from the cache of the Hub (HF_HOME), filled on a host with a way out: hosts
# that compute seldom have one, and each rank would try for minutes. HF_HUB_OFFLINE=0 lets them ask the Hub.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# Tokenizers with all threads, also after a fork; unset, they warn, and go on with one.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true}

# What a rank says stands in the log when it is said, not when a buffer is full.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}

# Files and sockets that a process may have open: 1,024 is the usual limit, and may be raised to the hard one.
# A rank maps the shards of keys and lists, and has a connection to every other.
ulimit -S -n "$(ulimit -H -n)" 2> /dev/null || true
