#!/bin/bash
# Runs a command on Ray over the machines of a Slurm job. From the repository root; repository, home
# and ~/tmu-dist-venv (made by cluster/node_setup.sh, or an active one) are seen by all machines:
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=1-0 cluster/slurm.sh \
#       python -m tmu_dist.train --recipe digits-tmu --output /shared/runs/first
#
# The command's exit status is the job's. What else there is to set are options of sbatch, the
# variables of node_env.sh, and HEAD_ADDRESS: of the first machine, as the others reach it (default:
# the first address that it has).
#
# Two minutes before its time is over the command is asked to end (SIGTERM) and saves a checkpoint;
# the job goes back to the queue, and the same command continues, as often as it takes. A job whose
# machine fails goes back to the queue, too. To end a job for good, with a checkpoint:
#
#   scancel --batch --signal=TERM JOB
#
# A plain `scancel JOB` ends Ray along with the command: the steps since the newest checkpoint are
# lost.

#SBATCH --job-name=tmu-dist
#SBATCH --output=tmu-dist-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

set -euo pipefail

if (($# == 0)); then
    echo "No command: sbatch [OPTION ...] cluster/slurm.sh python -m tmu_dist.train ..." >&2
    exit 2
fi
. cluster/node_env.sh
head_address=${HEAD_ADDRESS:-$(hostname -I | cut -d' ' -f1)}
port=6379
export RAY_ADDRESS=$head_address:$port
export RAY_AUTH_TOKEN_PATH=$HOME/.tmu-dist-token-$SLURM_JOB_ID
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # Ray ends after the command: nothing to wait for

ray=()
clean_up() {
    rm -f "$RAY_AUTH_TOKEN_PATH"
    kill "${ray[@]}" 2>/dev/null || true
    wait
}
trap clean_up EXIT

# A token of this job's own; environments and command lines only have the name of its file.
(
    umask 077
    python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"
)

# This script runs on the first machine, which is Ray's head and works like the others.
ray start --head --block --node-ip-address="$head_address" --port=$port \
    --num-cpus="$SLURM_CPUS_ON_NODE" --dashboard-host=127.0.0.1 &
ray+=($!)
until (: <"/dev/tcp/$head_address/$port") 2>/dev/null; do
    kill -0 "${ray[0]}" # the head has ended: so does this
    sleep 1
done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
    # shellcheck disable=SC2016 # each machine knows its own number of CPUs
    srun --nodes=$others --ntasks=$others --exclude="$SLURMD_NODENAME" --kill-on-bad-exit=0 \
        bash -c 'exec ray start --block --address="$RAY_ADDRESS" \
            --num-cpus="$SLURM_CPUS_ON_NODE"' &
    ray+=($!)
fi
python - "$SLURM_JOB_NUM_NODES" <<'END'
import sys
import time

import ray

ray.init(log_to_driver=False, logging_level="ERROR")
wanted, deadline = int(sys.argv[1]), time.monotonic() + 300
while (joined := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"Only {joined} of {wanted} machines joined Ray within 300 s.")
    time.sleep(1)
END

"$@" &
command=$!
is_time_over=false
trap 'is_time_over=true; kill -TERM $command' USR1
trap 'kill -TERM $command' TERM
while true; do
    status=0
    wait $command || status=$?
    kill -0 $command 2>/dev/null || break # else it was only a signal that ended the wait
done
trap '' USR1 TERM

if $is_time_over && ((status == 143)); then # it was stopped, and can continue
    clean_up
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
