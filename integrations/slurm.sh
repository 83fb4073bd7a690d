#!/usr/bin/env bash
# The same training on the nodes of a SLURM job: torchrun on each, which starts a process for each GPU.
#
#   sbatch integrations/slurm.sh configs/llama3_8b.toml --run.dir=/shared/runs/8b
#
# Submit it from the repository, after `make train` has set up .venv there; both must lie on a file system that all nodes
# share, and so must the run directory. Arguments are those of train.py. Ten minutes before the time limit all ranks save
# and stop, and the job is queued again; after the failure of a node SLURM does that itself. See docs/launchers.md.

#SBATCH --job-name=llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append

stopping=no
trap 'stopping=yes' USR1
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
export PATH="$PWD/.venv/bin:$PATH"
# The first node, where all meet, by a name that the other nodes know
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST_NODE
export OMP_NUM_THREADS=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
# Without it, ranks that torchrun has restarted look for peers that are gone (pytorch#135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Where a node has several networks. Where it calls itself 127.0.1.1 the job fails without:
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

# Starts a command with USR1 blocked, which its children inherit: nothing dies of it, and train.py looks for it each step
export HOLD_USR1='
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
os.execvp(sys.argv[1], sys.argv[1:])
'

# On each node. SLURM signals this shell alone, or all that it has started too (ProctrackType)
# shellcheck disable=SC2329 # srun's bash calls it
on_node() {
    trap '[[ -z $torchrun ]] || pkill -USR1 -P "$torchrun"' USR1 TERM
    python -c "$HOLD_USR1" torchrun \
        --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=2 \
        --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$FIRST_NODE:29500" \
        --rdzv_conf="is_host=$((SLURM_NODEID == 0))" --local_addr="$SLURMD_NODENAME" train.py "$@" &
    torchrun=$!
    while kill -0 "$torchrun" 2> /dev/null; do wait "$torchrun"; done # a trap ends `wait` early
    wait "$torchrun"
}

srun --kill-on-bad-exit=1 bash -c "$(declare -f on_node); on_node \"\$@\"" on_node "$@" &
srun=$!
# srun passes USR1 on to every node. Again and again: while something starts it may be missed
while kill -0 "$srun" 2> /dev/null; do
    [[ $stopping == no ]] || kill -USR1 "$srun"
    sleep 5 & wait "$!" # which the trap ends early
done
wait "$srun"
status=$?
[[ $stopping == no ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
