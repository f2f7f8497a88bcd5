# The nodes of the test cluster: each a network namespace on the bridge and a mount namespace, with its own containerd, kubelet and
# kube-proxy.
#
# The pid namespace, loop devices and the kernel are the machine's. What two kubelets could take from each other lies in folders and
# cgroups of the node's own; the folders that manifests name (OWN) are the node's by its mount namespace.
# shellcheck shell=bash
CONTAINERD_BIN=${CONTAINERD_BIN:-containerd} CTR_BIN=${CTR_BIN:-ctr} CNI_BIN=${CNI_BIN:-/usr/lib/cni}
# Folders of the host that manifests name: each node sees its own there, from $STATE/nN/own.
OWN="/var/lib/kubelet /var/lib/longhorn /var/lib/backing-image-csi"
PAUSE=test.local/pause:1 BUSYBOX=test.local/busybox:1

namespace() { echo "$PREFIX-n$1"; }
folder() { echo "$STATE/n$1"; }
address() { echo "$NET.$((10 + $1))"; }
on() { # on N COMMAND...: in that node's network and mounts
  local n=$1 pid
  shift
  pid=$(pid_of "mounts-$n") || die "node $n does not run"
  nsenter --net="/run/netns/$(namespace "$n")" --mount="/proc/$pid/ns/mnt" "$@"
}
# as_of N: the words that make a command one of that node's, for `start`, which needs a program.
as_of() { echo nsenter "--net=/run/netns/$(namespace "$1")" "--mount=/proc/$(pid_of "mounts-$1")/ns/mnt"; }
nodes() { # all that there is anything of
  {
    find "$STATE" -maxdepth 1 -name 'n[0-9]*' | sed 's|.*/n||'
    ip netns list | sed -n "s/^$PREFIX-n\([0-9]*\).*/\1/p"
    cgroups | xargs -r -I{} find {} -maxdepth 1 -name "$PREFIX-n[0-9]*" | sed 's/.*-n//'
  } | sort -nu
}
running_nodes() {
  local n
  for n in $(nodes); do if alive "kubelet-$n"; then echo "$n"; fi; done
}
cgroups() { awk '$3 == "cgroup" || $3 == "cgroup2" { print $2 }' /proc/mounts; }

# --- images ---------------------------------------------------------------
images() {
  mkdir -p "$STATE/images"
  [ "$STATE/images/pause.tar" -nt "$BIN/pause" ] ||
    "$BIN/mkimage" -o "$STATE/images/pause.tar" -ref "$PAUSE" -add "$BIN/pause=/pause" -entrypoint /pause
  [ -e "$STATE/images/busybox.tar" ] && return
  local links=() applet
  for applet in $(busybox --list); do [ "$applet" = busybox ] || links+=(-link "busybox=/bin/$applet"); done
  "$BIN/mkimage" -o "$STATE/images/busybox.tar" -ref "$BUSYBOX" -add "$(command -v busybox)=/bin/busybox" "${links[@]}" -dir /root -cmd sh
}
# sidecar_images: the sidecars that deploy/chart names, from the binaries that build.sh makes, under their official names.
sidecar_images() {
  local reference name binary archive
  mkdir -p "$STATE/images"
  for reference in $(sed -n 's|^ *image: \(registry.k8s.io/sig-storage/.*\)$|\1|p' "$ROOT/deploy/chart/values.yaml"); do
    name=${reference##*/} name=${name%%:*} archive=$STATE/images/$name.tar
    case $name in
    livenessprobe) binary=$BIN/csi-liveness ;;
    csi-node-driver-registrar) binary=$BIN/csi-register ;;
    *) binary=$BIN/$name ;;
    esac
    case $name in
    csi-snapshotter) [ -x "$binary" ] || { echo "no $name: the chart does not run it unless asked (build.sh more-csi)" && continue; } ;;
    esac
    [ -x "$binary" ] || die "there is no $binary: run sanity-tests/cluster/build.sh"
    [ "$archive" -nt "$binary" ] || "$BIN/mkimage" -o "$archive" -ref "$reference" -add "$binary=/$name" -entrypoint "/$name"
  done
}
ctr_of() {
  local n=$1
  shift
  "$CTR_BIN" -a "$(folder "$n")/containerd.sock" -n k8s.io "$@"
}
import_images() { # import_images N: every archive in $STATE/images that it does not have
  local archive mark
  for archive in "$STATE"/images/*.tar; do
    mark=$(folder "$1")/imported.${archive##*/}
    if [ ! "$mark" -nt "$archive" ]; then
      ctr_of "$1" images import "$archive" >/dev/null
      touch "$mark"
    fi
  done
}

# --- mounts ---------------------------------------------------------------
# A process holds the node's mount namespace: what the machine mounts is seen there, what the node mounts is not seen here, and all
# of it goes with the last process in it. Inside everything is shared, so that what a CSI pod mounts below the kubelet's folder is
# seen by the kubelet, and back.
node_mounts() {
  local n=$1 d path
  d=$(folder "$n")
  for path in $OWN; do
    mkdir -p "$d/own$path"
    [ -d "$path" ] || { mkdir "$path"; echo "$path" >>"$STATE/made"; }
  done
  # shellcheck disable=SC2016 # it is for that shell
  start "mounts-$n" unshare --mount --propagation slave sh -ec 'd=$1; shift
    for path; do mount --bind "$d/own$path" "$path"; done
    mount --make-rshared /
    touch "$d/mounts-$$"
    exec sleep infinity' mounts "$d" $OWN
  await 10 "mounts of node $n" mounted "$n"
}
mounted() {
  local pid
  pid=$(pid_of "mounts-$1") && [ -e "$(folder "$1")/mounts-$pid" ]
}

# --- up -------------------------------------------------------------------
node_network() {
  local n=$1 space other link=$PREFIX-v$1
  space=$(namespace "$n")
  [ -e "/run/netns/$space" ] || ip netns add "$space"
  if ! ip link show "$link" >/dev/null 2>&1; then
    ip link add "$link" type veth peer name eth0 netns "$space"
  fi
  ip link set "$link" master "$BRIDGE" up
  ip -n "$space" link set lo up
  ip -n "$space" addr replace "$(address "$n")/24" dev eth0
  ip -n "$space" link set eth0 up
  ip -n "$space" route replace default via "$API"
  ip netns exec "$space" sysctl -qw net.ipv4.ip_forward=1
  ip route replace "$PODS.$n.0/24" via "$(address "$n")"
  for other in $(nodes); do
    if [ "$other" != "$n" ] && [ -e "/run/netns/$(namespace "$other")" ]; then
      ip -n "$space" route replace "$PODS.$other.0/24" via "$(address "$other")"
      ip -n "$(namespace "$other")" route replace "$PODS.$n.0/24" via "$(address "$n")" 2>/dev/null || true
    fi
  done
}
node_cgroups() {
  local root
  for root in $(cgroups); do
    mkdir -p "$root/$PREFIX-n$1"
    if [ -e "$root/cpuset.cpus" ] && [ ! -e "$root/cgroup.controllers" ]; then
      cat "$root/cpuset.cpus" >"$root/$PREFIX-n$1/cpuset.cpus"
      cat "$root/cpuset.mems" >"$root/$PREFIX-n$1/cpuset.mems"
    fi
  done
}
node_files() {
  local n=$1 d
  d=$(folder "$n")
  mkdir -p "$d"/{cni,pods-log,containerd}
  cert "node-$n" "/O=system:nodes/CN=system:node:n$n"
  kubeconfig "$d/kubelet.kubeconfig" "node-$n" "https://$API:$PORT"
  cat >"$d/cni/10-test.conflist" <<E
{"cniVersion": "0.4.0", "name": "$PREFIX", "plugins": [
 {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
  "ipam": {"type": "host-local", "dataDir": "$d/ipam", "ranges": [[{"subnet": "$PODS.$n.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
 {"type": "portmap", "capabilities": {"portMappings": true}}]}
E
  # restrict_oom_score_adj: without CAP_SYS_RESOURCE a sandbox (oom_score_adj -998) cannot be started.
  # Network namespaces of pods and the state of runc lie below the node's folder, so that nothing of them outlives it.
  cat >"$d/containerd.toml" <<E
version = 2
root = "$d/containerd/root"
state = "$d/containerd/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.native", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "$d/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$d/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$PAUSE"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        Root = "$d/containerd/runc"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$CNI_BIN"
    conf_dir = "$d/cni"
E
  # syncFrequency: the growth of a volume on the node waits for it. Images are never collected: they cannot be pulled again.
  cat >"$d/kubelet.yaml" <<E
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $(address "$n")
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: "$PKI/ca.crt"}}
authorization: {mode: Webhook}
containerRuntimeEndpoint: "unix://$d/containerd.sock"
cgroupDriver: cgroupfs
cgroupRoot: /$PREFIX-n$n
oomScoreAdj: 0
syncFrequency: 10s
failSwapOn: false
failCgroupV1: false
resolvConf: ""
podLogsDir: "$d/pods-log"
volumePluginDir: /var/lib/kubelet/volume-plugins
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%, imagefs.inodesFree: 1%}
maxPods: 60
E
  if [ "${FAST:-0}" = 1 ]; then printf 'nodeStatusUpdateFrequency: 2s\nnodeLeaseDurationSeconds: 6\n' >>"$d/kubelet.yaml"; fi
}
node_up() {
  local n=$1 d
  d=$(folder "$n")
  mkdir -p "$d"
  node_network "$n"
  node_files "$n"
  node_cgroups "$n"
  node_mounts "$n"
  # shellcheck disable=SC2046 # words
  start "containerd-$n" $(as_of "$n") "$CONTAINERD_BIN" -c "$d/containerd.toml" -l warn
  await 60 "containerd $n" ctr_of "$n" version
  images
  import_images "$n"
  kubelet_up "$n"
  [ "${PROXY:-1}" = 1 ] || return 0
  # The conntrack settings are the machine's, and stay as they are.
  # shellcheck disable=SC2046 # words
  start "proxy-$n" $(as_of "$n") "$BIN/kube-proxy" --kubeconfig="$STATE/admin.kubeconfig" \
    --hostname-override="n$n" --cluster-cidr="$PODS.0.0/16" --proxy-mode=iptables \
    --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0
}

kubelet_up() {
  local d
  d=$(folder "$1")
  # shellcheck disable=SC2046,SC2086 # words
  start "kubelet-$1" $(as_of "$1") "$BIN/kubelet" --config="$d/kubelet.yaml" --kubeconfig="$d/kubelet.kubeconfig" \
    --root-dir=/var/lib/kubelet --cert-dir=/var/lib/kubelet/pki --hostname-override="n$1" --node-ip="$(address "$1")" ${KUBELET_FLAGS:-}
}

# --- down -----------------------------------------------------------------
# node_down N: as if its power went; all steps may be repeated, and none needs the one before it to have come to its end.
node_down() {
  local n=$1 d name
  d=$(folder "$n")
  # First who would start anything anew, last containerd's shims, which have its name.
  for name in register kubelet proxy; do kill_all "$name-$n"; done
  kill_cgroups "$n"
  for name in $(names | grep -e "-$n\$"); do kill_all "$name"; done
  forget_shims "$d"
  unmount_below "$d"
  if [ -d "$d" ]; then find /var/log/containers -type l -lname "$d/*" -delete 2>/dev/null || true; fi
  ip link del "$PREFIX-v$n" 2>/dev/null || true
  [ ! -e "/run/netns/$(namespace "$n")" ] || ip netns del "$(namespace "$n")"
  ip route del "$PODS.$n.0/24" 2>/dev/null || true
  remove_cgroups "$n"
  rm -rf "$d/containerd/state" "$d/containerd/runc" "$d"/mounts-*
}
cgroups_of() { cgroups | xargs -r -I{} find "{}/$PREFIX-n$1" -depth -type d 2>/dev/null || true; }
kill_cgroups() { # the containers of a node
  local i pids
  for ((i = 0; i < 50; i++)); do
    pids=$(cgroups_of "$1" | sed 's|$|/cgroup.procs|' | { xargs -r cat 2>/dev/null || true; } | sort -u)
    [ -n "$pids" ] || return 0
    # shellcheck disable=SC2086 # one word for each pid
    kill -9 $pids 2>/dev/null || true
    sleep 0.1
  done
  die "these processes in the cgroups of node $1 do not end: $pids"
}
remove_cgroups() {
  local i
  for ((i = 0; i < 50; i++)); do
    cgroups_of "$1" | xargs -r rmdir 2>/dev/null || true
    [ -n "$(cgroups_of "$1")" ] || return 0
    sleep 0.1
  done
  die "these cgroups cannot be removed: $(cgroups_of "$1")"
}
forget_shims() { # their sockets lie in /run/containerd/s under a hash, which each notes
  local note
  for note in "$1"/containerd/state/io.containerd.runtime.v2.task/k8s.io/*/address; do
    [ -e "$note" ] || continue
    note=$(cat "$note")
    case $note in unix:///run/containerd/s/*) rm -f "${note#unix://}" ;; esac
  done
}
unmount_below() { # a folder and all below it
  local i mounts
  for ((i = 0; i < 10; i++)); do
    mounts=$(awk -v d="$1" '$5 == d || index($5, d "/") == 1 { print $5 }' /proc/self/mountinfo | sort -r)
    [ -n "$mounts" ] || return 0
    # shellcheck disable=SC2086 # one word for each mount: STATE has no blanks
    umount -l $mounts 2>/dev/null || true
  done
  die "these cannot be unmounted: $mounts"
}
