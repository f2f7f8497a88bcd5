#!/usr/bin/env bash
# Proves the test cluster by itself, without our driver: when this passes and a flow fails, the cluster is not to blame.
#
#   check.sh [PART...]
#     nodes    two nodes become Ready, a pod runs, all ends, and nothing is left (default)
#     kill     nothing is left either after kill -9 of the script at several moments (default)
#     alone    apiserver.sh ends with its input, and its processes end with it, also by kill -9 (default)
#     csi      the whole way of a volume through the sidecars and the kubelet, with samplecsi (needs `build.sh csi`)
set -euo pipefail
. "$(dirname "$0")/lib.sh"
CLUSTER=$HERE/cluster.sh MANIFESTS=$HERE/manifests
BEGAN=$(now)
say() { printf '== [%5s s] %s\n' "$(since "$BEGAN")" "$*"; }

# inventory: what a cluster could leave on the machine, outside of its own folders.
inventory() {
  echo "processes: $(tagged | wc -l)"
  awk -v d="$STATE" 'index($5, d) == 1 || $5 ~ /^\/run\/netns/ { print "mount", $5 }' /proc/self/mountinfo | sort
  ip -o link | sed -n 's/^[0-9]*: \([^@:]*\).*/link \1/p' | sort
  ip route | sed 's/^/route /' | sort
  find /run/netns -mindepth 1 2>/dev/null | sort
  find /sys/fs/cgroup -name 'bicluster*' | sort
  find /var/lib/cni/results /var/log/containers /var/log/pods /run/containerd -mindepth 1 ! -type d 2>/dev/null | sort
  losetup -l -n -O NAME,BACK-FILE | awk -v d="$STATE/" 'index($2, d) == 1 { print "loop", $0 }'
  sysctl vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops
}
compare() {
  local new
  new=$(comm -13 <(sort <<<"$BEFORE") <(inventory | sort))
  [ -z "$new" ] || die "the cluster left behind:"$'\n'"$new"
  echo "nothing is left"
}

nodes() {
  say "two nodes"
  "$CLUSTER" up 2
  k get nodes -o wide
  "$CLUSTER" status
  say "a pod"
  k apply -f "$MANIFESTS/trivial.yaml"
  await 60 "pod done" k wait --for=jsonpath='{.status.phase}'=Succeeded pod/trivial --timeout=1s
  k logs trivial
  k get pod trivial -o wide
  [ "$(k logs trivial | head -1)" = "it runs" ] || die "the pod's log is not what it wrote"
  say "down"
  "$CLUSTER" down
  compare
  "$CLUSTER" wipe
}

kill_in_the_middle() {
  local name moment pid
  for name in etcd apiserver controller-manager containerd-1 kubelet-1 containerd-2 proxy-2; do
    say "kill -9 of up, when it has started $name"
    "$CLUSTER" up 2 &
    pid=$!
    await 120 "$name" alive $name
    kill -9 $pid
    wait $pid 2>/dev/null || true
    "$CLUSTER" down
    compare
    # The others begin with what the one before left.
    if [ $name = containerd-1 ]; then "$CLUSTER" wipe; fi
  done
  for moment in 0.1 0.3 0.6 1.2; do
    say "kill -9 of down after $moment s, with a pod on each node"
    "$CLUSTER" up 2
    for name in n1 n2; do sed "s/NODE/$name/" "$MANIFESTS/sleeper.yaml" | k apply -f -; done
    # The first time they are new; then they come back as after a loss of power, and their status is still that of before.
    for name in n1 n2; do await 60 "pod on $name" k exec "sleeper-$name" -- true; done
    "$CLUSTER" down &
    pid=$!
    sleep $moment
    kill -9 $pid 2>/dev/null || true
    wait $pid 2>/dev/null || true
    "$CLUSTER" down
    compare
  done
  "$CLUSTER" wipe
}

# gone MARK: no process has it in its environment any more.
gone() { ! grep -qzs "^ALONE=$1\$" /proc/[0-9]*/environ; }
alone() {
  local way pid input answer
  for way in "end of input" "kill -9"; do
    say "apiserver.sh: $way"
    # What it starts inherits the mark.
    coproc SERVER { ALONE=$$ exec "$HERE/apiserver.sh"; }
    pid=$SERVER_PID input=${SERVER[1]}
    read -r answer <&"${SERVER[0]}"
    [[ $answer == ready\ * ]] || die "apiserver.sh answers $answer"
    ! gone $$ || die "the mark is not found: this proves nothing"
    if [ "$way" = "kill -9" ]; then kill -9 "$pid"; else exec {input}>&-; fi
    await 20 "end of its processes" gone $$
    wait "$pid" 2>/dev/null || true
    rm -rf "${answer#ready }"
  done
}

# --- csi ------------------------------------------------------------------
pod() { # pod NAME NODE COMMAND
  local text
  text=$(grep -v '^#' "$MANIFESTS/pod.yaml")
  text=${text//NAME/"$1"}
  text=${text//NODE/"$2"}
  text=${text//COMMAND/"$3"}
  k apply -f - <<<"$text"
}
has_driver() { k get csinode "n$1" -o jsonpath='{.spec.drivers[*].name}' | grep -q sample.csi.example; }
is_none() { [ -z "$(k get "$1" -o name)" ]; }
csi() {
  local d=$STATE/csi n claim began
  say "driver, sidecars, registration"
  "$CLUSTER" up 2
  mkdir -p "$d"
  "$CLUSTER" daemon driver-controller 0 "$BIN/samplecsi" -endpoint "$d/c.sock" -dir "$d/data" -node-id none
  for n in 1 2; do "$CLUSTER" daemon "driver-$n" "$n" "$BIN/samplecsi" -endpoint "$d/n$n.sock" -dir "$d/data" -node-id "n$n"; done
  await 10 "driver's socket" test -S "$d/c.sock"
  "$CLUSTER" sidecars "$d/c.sock"
  for n in 1 2; do
    await 10 "driver's socket on n$n" test -S "$d/n$n.sock"
    "$CLUSTER" register "$n" "$d/n$n.sock"
    await 30 "driver in CSINode n$n" has_driver "$n"
  done
  k apply -f "$MANIFESTS/class.yaml"
  say "claims are bound"
  k apply -f "$MANIFESTS/claims.yaml"
  for claim in files raw; do await 60 "claim $claim bound" k wait --for=jsonpath='{.status.phase}'=Bound pvc/$claim --timeout=1s; done

  say "a pod on n1 writes to both"
  pod writer n1 "echo kept > /data/f; sync; printf RAWKEPT | dd of=/dev/xraw conv=fsync; sleep 100000"
  await 90 "writer running" k wait --for=condition=Ready pod/writer --timeout=1s
  say "both grow while in use"
  for claim in files raw; do k patch pvc $claim --type=merge -p '{"spec":{"resources":{"requests":{"storage":"400Mi"}}}}'; done
  for claim in files raw; do await 150 "claim $claim at 400Mi" k wait --for=jsonpath='{.status.capacity.storage}'=400Mi pvc/$claim --timeout=1s; done
  say "a snapshot, and a claim from it"
  k apply -f "$MANIFESTS/snapshot.yaml"
  await 60 "snapshot ready" k wait --for=jsonpath='{.status.readyToUse}'=true volumesnapshot/files-1 --timeout=1s
  await 60 "reader done" k wait --for=jsonpath='{.status.phase}'=Succeeded pod/reader --timeout=1s
  [ "$(k logs reader | head -1)" = kept ] || die "the snapshot lacks what was written"
  k delete -f "$MANIFESTS/snapshot.yaml" --wait=true

  say "the pod goes, another on n2 finds the data"
  k delete pod writer --wait=true
  pod second n2 "cat /data/f; dd if=/dev/xraw bs=7 count=1; echo; sleep 100000"
  await 120 "second running on n2" k wait --for=condition=Ready pod/second --timeout=1s
  # shellcheck disable=SC2016 # it is for the pod's shell
  k exec second -- sh -ec 'test "$(cat /data/f)" = kept; test "$(dd if=/dev/xraw bs=7 count=1 2>/dev/null)" = RAWKEPT; echo same data'
  say "all of it goes"
  began=$(now)
  k delete pod second --wait=true
  await 60 "detached" is_none volumeattachments
  k delete pvc files raw --wait=true
  await 60 "volumes gone" is_none persistentvolumes
  [ -z "$(find "$d/data/vol" "$d/data/snap" -type f)" ] || die "files of volumes are left"
  [ -z "$(losetup -l -n -O BACK-FILE | grep "$d/data" || true)" ] || die "loop devices are left"
  echo "removed: $(since "$began") s; no file and no loop device is left"
  "$CLUSTER" down
  compare
  "$CLUSTER" wipe
}

[ "$(id -u)" = 0 ] || die "it needs root"
[ ! -e "$STATE" ] || die "$STATE is in use: \`cluster.sh wipe\` removes that cluster, or choose another CLUSTER_STATE"
[ $# -gt 0 ] || set -- alone nodes kill
BEFORE=$(inventory)
trap '"$CLUSTER" wipe >/dev/null' EXIT
for part; do
  case $part in
  nodes) nodes ;;
  kill) kill_in_the_middle ;;
  alone) alone ;;
  csi) csi ;;
  *) die "there is no part $part; there are alone, nodes, kill and csi" ;;
  esac
done
say "PASS: $*"
