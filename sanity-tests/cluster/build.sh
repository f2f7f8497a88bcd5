#!/usr/bin/env bash
# Builds what the test cluster runs and Debian does not have, into $CLUSTER_CACHE/bin (default: target/cluster/bin); what is fresh stays.
#
#   build.sh [GROUP...]     kube, csi, more-csi, tools and helm by default; etcd and containerd where Debian's will not do.
#                           The flows (sanity-tests/e2e) need kube, csi and tools
#
# All comes from Go modules by the usual proxy, pinned in versions.env and k8s/. Cold it takes about 20 minutes on two cores, and
# nothing from the network when all is fresh.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
export CGO_ENABLED=0 GOFLAGS=-buildvcs=false
VERSION=k8s.io/component-base/version
# Without these the commands call themselves v0.0.0-master.
KUBE_FLAGS="-s -w -X $VERSION.gitVersion=$KUBE -X $VERSION.gitMajor=1 -X $VERSION.gitMinor=$(cut -d. -f2 <<<"$KUBE") -X $VERSION.gitTreeState=clean"

# fresh NAME KEY: whether that binary was built from what the key says. The key is kept for the build.
key=
fresh() {
  key=$(printf '%s\n' "$(go env GOVERSION)" "$2" | sha256sum)
  [ -x "$BIN/$1" ] && [ "$(cat "$BIN/.$1.key" 2>/dev/null)" = "$key" ] && echo "$1: cached"
}
# compile NAME FOLDER PACKAGE LDFLAGS [GO BUILD FLAG...]
compile() {
  local name=$1 folder=$2 package=$3 ldflags=$4 began
  shift 4
  began=$(now)
  # The name appears when the binary is whole, and its key after it.
  (cd "$folder" && nice -n 10 go build -trimpath "$@" -ldflags "$ldflags" -o "$BIN/.$name.part" "$package")
  rm -f "$BIN/.$name.key"
  mv "$BIN/.$name.part" "$BIN/$name"
  echo "$key" >"$BIN/.$name.key"
  echo "$name: $(since "$began") s, $(stat -c %s "$BIN/$name") bytes" | tee -a "$CACHE/build-times.txt"
}
hash_of() { (cd "$1" && find . -type f \( -name '*.go' -o -name go.mod -o -name go.sum \) -print0 | sort -z | xargs -0 sha256sum | sha256sum); }
folder_of() { go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",\?$/\1/p'; }

# published NAME MODULE@VERSION [GO MOD EDIT FLAG...]: a writable copy of a module in $CACHE/src, built as a main module with the very
# versions that its own go.mod and go.sum name: `go install` refuses modules with replace lines, and these cannot share one build list.
published() {
  local name=$1 module=$2 folder=$CACHE/src/$1
  shift 2
  [ "$(cat "$folder/.from" 2>/dev/null)" = "$module $*" ] && return
  rm -rf "$folder"
  mkdir -p "$folder"
  cp -r "$(folder_of "$module")/." "$folder"
  chmod -R u+w "$folder"
  if [ $# -gt 0 ]; then (cd "$folder" && go mod edit "$@"); fi
  echo "$module $*" >"$folder/.from"
}
# sidecar BINARY SOURCE MODULE@VERSION [GO MOD EDIT FLAG...]
sidecar() {
  local binary=$1 source=$2 module=$3
  shift 3
  fresh "$binary" "$module $*" && return
  published "$source" "$module" "$@"
  compile "$binary" "$CACHE/src/$source" "./cmd/$binary" "-s -w -X main.version=${module##*@}" -mod=mod
}

kube() {
  local binary pins
  pins=$(cat "$HERE/k8s/go.mod" "$HERE/k8s/go.sum" | sha256sum)
  for binary in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do
    fresh $binary "$pins $KUBE_FLAGS" || compile $binary "$HERE/k8s" k8s.io/kubernetes/cmd/$binary "$KUBE_FLAGS"
  done
  for binary in csi-register csi-liveness samplecsi; do
    fresh $binary "$(hash_of "$HERE/k8s")" || compile $binary "$HERE/k8s" ./cmd/$binary "-s -w"
  done
}
csi() {
  sidecar csi-provisioner provisioner "$PROVISIONER"
  sidecar csi-attacher attacher "$ATTACHER"
  sidecar csi-resizer resizer "$RESIZER"
}
more-csi() {
  # Its go.mod points the client module at ./client, which the published archive leaves out; the released client stands in for it.
  local binary client="-replace=${SNAPSHOT_CLIENT%@*}=$SNAPSHOT_CLIENT"
  for binary in csi-snapshotter snapshot-controller; do
    sidecar $binary snapshotter "$SNAPSHOTTER" "$client"
  done
  if [ "$(cat "$CACHE/crd/.from" 2>/dev/null)" != "$SNAPSHOT_CLIENT" ]; then
    rm -rf "$CACHE/crd"
    mkdir -p "$CACHE/crd"
    cp "$(folder_of "$SNAPSHOT_CLIENT")"/config/crd/snapshot.storage.k8s.io_*.yaml "$CACHE/crd/"
    chmod u+w "$CACHE"/crd/*
    echo "$SNAPSHOT_CLIENT" >"$CACHE/crd/.from"
  fi
}
tools() {
  local binary
  for binary in mkimage pause; do
    fresh $binary "$(hash_of "$HERE/cmd/$binary")" || compile $binary "$ROOT/sanity-tests" ./cluster/cmd/$binary "-s -w"
  done
}
helm() {
  sidecar helm helm "$HELM"
}
etcd() {
  local module=go.etcd.io/etcd
  fresh etcd "$ETCD" && return
  published etcd "$ETCD" -dropreplace=$module/api/v3 -dropreplace=$module/client/pkg/v3 -dropreplace=$module/client/v3 -dropreplace=$module/pkg/v3
  compile etcd "$CACHE/src/etcd" . "-s -w" -mod=mod
}
containerd() {
  local binary flags="-s -w -X github.com/containerd/containerd/v2/version.Version=${CONTAINERD##*@}"
  for binary in containerd containerd-shim-runc-v2 ctr; do
    fresh $binary "$CONTAINERD" && continue
    published containerd "$CONTAINERD"
    compile $binary "$CACHE/src/containerd" ./cmd/$binary "$flags" -mod=mod -tags=no_btrfs,no_zfs,no_devmapper
  done
}

command -v go >/dev/null || die "Go is missing: install the version that k8s/go.mod and versions.env need (1.26 or later)"
began=$(now)
mkdir -p "$BIN"
exec 8>"$CACHE/build.lock"
flock 8 # a second build waits for the first
[ $# -gt 0 ] || set -- kube csi more-csi tools helm
for group; do
  case $group in
  kube | csi | more-csi | tools | helm | etcd | containerd) "$group" ;;
  *) die "there is no group $group; there are kube, csi, more-csi, tools, helm, etcd and containerd" ;;
  esac
done
echo "build: $(since "$began") s in all"
