#!/usr/bin/env bash
# A real Kubernetes on one machine, without a registry and without anything from outside.
#
#   cluster.sh up [NODES]              brings it up with nodes n1, n2, … and waits until they are Ready; FAST=1 has a lost node
#                                      noticed in about 8 s instead of 50
#   cluster.sh down                    ends and removes all but the data, also what a killed script left; `wipe` removes that too
#   cluster.sh status                  what runs
#   cluster.sh kubectl ARG...          as administrator; other programs take $CLUSTER_STATE/admin.kubeconfig
#   cluster.sh node-up N | node-down N one node more or less
#   cluster.sh cut N | mend N          takes a node's network away, and gives it back
#   cluster.sh on N COMMAND...         in node N's network and mounts
#   cluster.sh kubelet-stop N | kubelet-start N   the kubelet alone; the pods go on
#   cluster.sh images [ARCHIVE...]     imports every archive of $CLUSTER_STATE/images on every node; these are added to them
#   cluster.sh sidecar-images          adds the sidecars that deploy/chart names, under their official names, for the next `up`
#   cluster.sh daemon NAME N COMMAND.. starts COMMAND in node N (0: in none), until `stop NAME` or `down`
#   cluster.sh sidecars SOCKET | sidecars-down   the CSI sidecars, for a driver's controller socket
#   cluster.sh register N SOCKET | unregister N  a driver's node socket at node N's kubelet
set -euo pipefail
. "$(dirname "$0")/lib.sh"
. "$HERE/control.sh"
. "$HERE/node.sh"

need() {
  local program missing=()
  [ "$(id -u)" = 0 ] || die "it needs root: namespaces, mounts and cgroups"
  for program in "$ETCD_BIN" "$CONTAINERD_BIN" "$CTR_BIN" runc busybox iptables conntrack ip nsenter openssl losetup; do
    command -v "$program" >/dev/null || missing+=("$program")
  done
  [ -x "$CNI_BIN/bridge" ] || missing+=("$CNI_BIN/bridge")
  [ ${#missing[@]} = 0 ] || die "missing: ${missing[*]}; on Debian run scripts/install-packages.sh cluster"
  for program in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl mkimage pause; do
    [ -x "$BIN/$program" ] || die "there is no $BIN/$program: run sanity-tests/cluster/build.sh"
  done
}

up() {
  local n began
  began=$(now)
  control_up
  for ((n = 1; n <= $1; n++)); do node_up "$n"; done
  for ((n = 1; n <= $1; n++)); do ready "$n"; done
  await 60 "default service account" k get serviceaccount default
  echo "up: $(since "$began") s in all"
}
ready() { await 120 "node n$1 ready" k wait --for=condition=Ready "node/n$1" --timeout=1s; }

down() {
  local n name began
  began=$(now)
  sidecars_down
  for name in $(names | grep -vxE "(containerd|kubelet|proxy|register)-[0-9]+|scheduler|controller-manager|apiserver|etcd"); do stop "$name"; done
  loops | xargs -r -n1 losetup -d
  for n in $(nodes); do node_down "$n"; done
  # Those that were in use until now.
  loops | xargs -r -n1 losetup -d
  control_down
  kill_all
  unmount_below "$STATE"
  ip link del "$BRIDGE" 2>/dev/null || true
  # What the network plugins answered; each names the namespace of its pod, which lay below a node's folder.
  { grep -lsF "$STATE/" /var/lib/cni/results/* || true; } | xargs -r rm -f
  # `ip netns` makes it a mount of its own when it makes the first one.
  if [ -d /run/netns ] && [ -z "$(ls -A /run/netns)" ]; then umount /run/netns 2>/dev/null || true; fi
  # Places to mount on that were not there before.
  if [ -e "$STATE/made" ]; then
    xargs rmdir --ignore-fail-on-non-empty <"$STATE/made"
    rm -f "$STATE/made"
  fi
  echo "down: $(since "$began") s"
}
# The loop devices of the cluster: of files below its folder, and of files that pods see where nodes have folders of their own.
loops() {
  losetup -l -n -O NAME,BACK-FILE | awk -v folders="$STATE $OWN" '
    BEGIN { n = split(folders, folder) }
    { for (i = 1; i <= n; i++) if (index($2, folder[i] "/") == 1) { print $1; next } }'
}

command=${1:-status}
shift || true
case $command in up | node-up) need ;; esac
mkdir -p "$STATE"
case $command in
up | node-up | node-down | down | wipe)
  exec 9<"$STATE"
  flock 9 # one at a time
  ;;
esac
case $command in
up) up "${1:-1}" ;;
node-up)
  node_up "$1"
  ready "$1"
  ;;
node-down) node_down "$1" ;;
down) down ;;
wipe)
  down
  rm -rf "$STATE"
  ;;
sidecar-images) sidecar_images ;;
images)
  images
  [ $# = 0 ] || cp "$@" "$STATE/images/"
  for n in $(running_nodes); do import_images "$n"; done
  ;;
sidecars) sidecars "$1" ;;
sidecars-down) sidecars_down ;;
register) start "register-$1" "$BIN/csi-register" --csi-address="$2" --plugin-registration-path="$(folder "$1")/own/var/lib/kubelet/plugins_registry" ;;
unregister) stop "register-$1" ;;
daemon)
  name=$1 n=$2
  shift 2
  # shellcheck disable=SC2046 # words
  if [ "$n" = 0 ]; then start "$name" "$@"; else start "$name" $(as_of "$n") "$@"; fi
  ;;
stop) stop "$1" ;;
kubelet-stop) stop "kubelet-$1" ;;
kubelet-start) kubelet_up "$1" ;;
cut) ip link set "$PREFIX-v$1" down ;;
mend) ip link set "$PREFIX-v$1" up ;;
kubectl) k "$@" ;;
on) on "$@" ;;
status) for name in $(names); do echo "$name: $(pid_of "$name" || echo "only what it started")"; done ;;
*) die "there is no command $command; the top of this file lists them" ;;
esac
