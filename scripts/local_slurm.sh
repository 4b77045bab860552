#!/usr/bin/env bash
# A SLURM cluster of one node, this machine, for tests and to try a sweep out. Debian, as root; no systemd.
#
#   eval "$(scripts/local_slurm.sh start)"   install what is missing, start, and point this shell's SLURM commands at it
#   scripts/local_slurm.sh status
#   scripts/local_slurm.sh env               the line that `start` prints, for another shell
#   scripts/local_slurm.sh stop              end its jobs and daemons
#
# Everything it writes lies in $LOCAL_SLURM_ROOT (default: /tmp/local-slurm), nothing in /etc/slurm or /etc/munge.
# The daemons listen on 127.0.0.1, on $LOCAL_SLURM_PORT (default: 46817) and the port after it.
# Exit code: 3 where there can be no such cluster (not root, no packages), 1 for any other trouble.
set -euo pipefail

ROOT=${LOCAL_SLURM_ROOT:-/tmp/local-slurm}
PORT=${LOCAL_SLURM_PORT:-46817}
PACKAGES=(munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins)
export SLURM_CONF=$ROOT/slurm.conf PATH=$PATH:/usr/sbin  # the daemons lie there, which not every shell looks through

say() { echo "local_slurm: $*" >&2; }
die() { say "$*"; exit 1; }
cannot() { say "$*"; exit 3; }

# Whether the process of a pid file lives and is what it was: a number may have been given to another process.
alive() {
  local pid
  pid=$(cat "$ROOT/$1.pid" 2>/dev/null) && [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]
}

wait_for() { # seconds, what, command
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until timeout 5 "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || die "$what did not come up; logs: $ROOT"
    sleep 0.1
  done
}

install() {
  dpkg-query -W -f '${db:Status-Abbrev}\n' "${PACKAGES[@]}" 2>/dev/null | grep -c '^ii' | grep -qx "${#PACKAGES[@]}" && return
  command -v apt-get >/dev/null || cannot "needs Debian's apt-get"
  local get=(apt-get -qq -o DPkg::Lock::Timeout=60)
  export DEBIAN_FRONTEND=noninteractive
  "${get[@]}" install -y --no-install-recommends "${PACKAGES[@]}" >"$ROOT/apt.log" 2>&1 ||
    { "${get[@]}" update && "${get[@]}" install -y --no-install-recommends "${PACKAGES[@]}"; } >>"$ROOT/apt.log" 2>&1 ||
    cannot "could not install ${PACKAGES[*]}: $ROOT/apt.log"
}

configure() {
  local host cpus memory
  host=$(hostname -s)
  cpus=$(nproc)
  memory=$(awk '/^MemTotal/ {print int($2 / 1024) - 512}' /proc/meminfo)
  getent hosts "$host" >/dev/null || echo "127.0.0.1 $host" >>/etc/hosts
  : >"$ROOT/plugstack.conf"
  # cred_expire: a requeued job waits as long as that, by default two minutes.
  cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
NodeName=$host NodeHostname=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=24:00:00 DefaultTime=60
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
StateSaveLocation=$ROOT/slurmctld
SlurmdSpoolDir=$ROOT/slurmd
SlurmctldPidFile=$ROOT/slurmctld.pid
SlurmdPidFile=$ROOT/slurmd.pid
SlurmctldLogFile=$ROOT/slurmctld.log
SlurmdLogFile=$ROOT/slurmd.log
PlugStackConfig=$ROOT/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
KillWait=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PriorityType=priority/basic
CONF
}

start() {
  [ "$(id -u)" = 0 ] || cannot "run as root"
  mkdir -p "$ROOT"/{slurmctld,slurmd}
  chmod 755 "$ROOT"
  install
  if ! alive munged; then
    [ -s "$ROOT/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$ROOT/munge.key")
    # --force: as root, with files of its own
    munged --force --socket="$ROOT/munge.socket" --key-file="$ROOT/munge.key" --log-file="$ROOT/munged.log" \
      --pid-file="$ROOT/munged.pid" --seed-file="$ROOT/munged.seed" --origin=127.0.0.1 2>>"$ROOT/munged.start.log"
    wait_for 10 munged munge -n -S "$ROOT/munge.socket"
  fi
  alive slurmctld || { configure && slurmctld && wait_for 20 slurmctld scontrol ping; }
  alive slurmd || slurmd -N "$(hostname -s)"
  wait_for 20 "the node" sh -c "sinfo -h -o %T | grep -qE 'idle|mixed|allocated'"
  say "runs; logs: $ROOT"
  environment
}

environment() { printf 'export SLURM_CONF=%q\n' "$SLURM_CONF"; }

status() {
  for daemon in munged slurmctld slurmd; do
    alive "$daemon" && say "$daemon runs ($(cat "$ROOT/$daemon.pid"))" || say "$daemon does not run"
  done
  if alive slurmctld; then timeout 10 sinfo; timeout 10 squeue; fi
}

stop() {
  if alive slurmctld; then
    timeout 10 scancel --user=root --full 2>/dev/null || true # or their steps are left without a cluster
    for _ in $(seq 50); do
      [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break
      sleep 0.2
    done
  fi
  for daemon in slurmd slurmctld munged; do
    alive "$daemon" || continue
    kill "$(cat "$ROOT/$daemon.pid")"
    for _ in $(seq 50); do
      alive "$daemon" || break
      sleep 0.1
    done
    if alive "$daemon"; then kill -9 "$(cat "$ROOT/$daemon.pid")"; fi
    rm -f "$ROOT/$daemon.pid"
  done
}

case "${1:-}" in
start | stop | status) "$1" ;;
env) environment ;;
*) die "start, stop, status or env?" ;;
esac
