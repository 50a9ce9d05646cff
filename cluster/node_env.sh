# The environment of `ray start`, the same on every machine; everything that Ray starts there, jobs
# and workers, has it too. Read by a shell: . ~/tmu-dist/cluster/node_env.sh

unset OMP_NUM_THREADS PYTHONWARNINGS  # `ray up` gives its commands one thread each: not for these
[ ! -f ~/tmu-dist-settings.sh ] || . ~/tmu-dist-settings.sh  # what the cluster's file says
[ ! -f ~/.tmu-dist-store.sh ] || . ~/.tmu-dist-store.sh  # how to reach the object store
export TMU_DIST_NODES_KNOW_STORES=1  # so jobs need not hand keys on, where the dashboard shows them

export PATH="$HOME/tmu-dist-venv/bin:$PATH"
export RAY_AUTH_MODE=token  # what it is by default depends on the files that happen to be there
export RAY_USAGE_STATS_ENABLED=0

# A machine that falls silent is lost after about 5 seconds, not after a minute; and one that lost
# the head, or was left behind by `ray down`, ends its Ray after 15 seconds (docs/faults.md).
export RAY_health_check_initial_delay_ms=2000
export RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=1000
export RAY_health_check_failure_threshold=3
export RAY_gcs_rpc_server_reconnect_timeout_s=15

export RAY_JOB_STOP_WAIT_TIME_S=60  # a stopped run writes a checkpoint first
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^lo,docker,veth,virbr}"

ulimit -n "$(ulimit -Hn)"  # open files: as many as the system allows
