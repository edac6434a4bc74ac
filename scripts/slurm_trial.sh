#!/usr/bin/env bash
# scripts/slurm_trial.sh
# Run tests/slurm_trial.py on a SLURM of two nodes, which this script starts on this machine and ends again.
# It takes two minutes. It needs Linux with apt-get, and root or user namespaces. It unpacks SLURM's Debian packages into
# a temporary folder and installs nothing.
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2,/^set/s/^# \?//p' "$0"; exit; fi

if [ "${1:-}" != inside ]; then
  source "$(dirname "$0")/environment.sh"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  echo "== Unpacking SLURM"
  wanted=$(apt-get --no-install-recommends --simulate install slurmd slurmctld slurm-client munge | awk '/^Inst/ {print $2}')
  # apt-get warns as root that it downloads as root.
  (cd "$work" && apt-get -qq download $wanted 2> >(grep -v unsandboxed >&2))
  for package in "$work"/*.deb; do dpkg -x "$package" "$work/unpacked"; done
  # In namespaces of its own, the trial has its own network and its own /etc/hosts, and all that it starts ends with it.
  user=()
  [ "$(id -u)" = 0 ] || user=(--map-root-user)
  unshare "${user[@]}" --mount --net --pid --mount-proc --fork --kill-child "$BASH" "$0" inside "$work"
  exit
fi

work=$2
libraries=$(dirname "$work"/unpacked/usr/lib/*/slurm-wlm)
export PATH="$work/unpacked/usr/sbin:$work/unpacked/usr/bin:$PATH" SLURM_CONF="$work/slurm.conf"
export LD_LIBRARY_PATH="$libraries:$libraries/slurm-wlm${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
host=$(hostname)
ip link set lo up
ip address add 127.0.0.2/8 dev lo
ip address add 127.0.0.3/8 dev lo
printf '%s\n' "127.0.0.1 localhost $host" "127.0.0.2 node1" "127.0.0.3 node2" > "$work/hosts"
mount --bind "$work/hosts" /etc/hosts

(umask 077 && head -c 128 /dev/urandom > "$work/munge.key")
cat > "$SLURM_CONF" <<END
ClusterName=trial
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket,cred_expire=5  # a job that is requeued starts again after this many seconds
PluginDir=$libraries/slurm-wlm
StateSaveLocation=$work/state
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.%n.pid
SlurmdSpoolDir=$work/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.2 Port=17001 CPUs=1
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.3 Port=17002 CPUs=1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
END
mkdir "$work/state" "$work/spool.node1" "$work/spool.node2"

echo "== Starting $(slurmd-wlm -V) with two nodes"
munged --foreground --force --key-file "$work/munge.key" --socket "$work/munge.socket" --pid-file "$work/munge.pid" \
  --seed-file "$work/munge.seed" &> "$work/munged.log" &
until [ -S "$work/munge.socket" ]; do sleep 0.1; done
slurmctld-wlm -D &> "$work/slurmctld.log" &
for node in node1 node2; do
  slurmd-wlm -D -N $node -d "$work/unpacked/usr/sbin/slurmstepd-wlm" &> "$work/$node.log" &
done
if ! timeout 60 srun --nodes 2 true; then
  tail -n 20 "$work"/*.log
  exit 1
fi
python -m pytest -q -s --no-header --basetemp "$work/trial" tests/slurm_trial.py
