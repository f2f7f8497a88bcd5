#!/usr/bin/env bash
# A real kube-apiserver over a real etcd, without nodes, for as long as its standard input is open.
#
# It prints `ready FOLDER` when it answers; FOLDER has admin.kubeconfig, stranger.kubeconfig (a user without any right) and log/.
# A line on its input is a command, answered by a line:
#   start     the API server again, after `stop`        → ready FOLDER
#   stop      the API server only; etcd stays           → stopped
#   collect   the garbage collector of the controller manager, for the kinds that exist by now → collecting
# Its processes end with it, however it ends. It needs no root, and ports that are free.
set -euo pipefail
# shellcheck disable=SC2034 # lib.sh takes it
CLUSTER_STATE=$(mktemp -d /tmp/bi-apiserver.XXXXXX)
. "$(dirname "$0")/lib.sh"

cleanup() {
  local status=$?
  trap - EXIT
  kill_all
  if [ "$status" = 0 ] || [ ! -d "$LOG" ]; then rm -rf "$STATE"; else echo "${0##*/}: the logs are kept in $LOG" >&2; fi
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for program in etcd openssl setpriv; do
  command -v $program >/dev/null || die "there is no $program: run scripts/install-packages.sh cluster"
done
for program in kube-apiserver kube-controller-manager kubectl; do
  [ -x "$BIN/$program" ] || die "there is no $BIN/$program: run sanity-tests/cluster/build.sh"
done

free_port() { # one that nobody listens on or has a connection at
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    if ! grep -qi ":$(printf '%04X' "$port") " /proc/net/tcp /proc/net/tcp6; then
      echo "$port"
      return
    fi
  done
}
# As `start`, and it dies with this script.
attend() {
  local name=$1
  shift
  start "$name" setpriv --pdeathsig KILL "$@"
}
apiserver() {
  attend apiserver "$BIN/kube-apiserver" --etcd-servers="http://127.0.0.1:$client" --bind-address=127.0.0.1 --secure-port="$secure" \
    --advertise-address=192.0.2.1 --endpoint-reconciler-type=none --service-cluster-ip-range=10.0.0.0/24 --authorization-mode=RBAC \
    --client-ca-file="$PKI/ca.crt" --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" \
    --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$PKI/sa.key" \
    --service-account-signing-key-file="$PKI/sa.key" --profiling=false
  await 120 "apiserver ready" k get --raw /readyz >&2
  echo "ready $STATE"
}

authority
cert apiserver /CN=kube-apiserver "IP:127.0.0.1,DNS:localhost"
cert admin /O=system:masters/CN=admin
cert stranger /CN=stranger
client=$(free_port) peer=$(free_port) secure=$(free_port)
kubeconfig "$STATE/admin.kubeconfig" admin "https://127.0.0.1:$secure"
kubeconfig "$STATE/stranger.kubeconfig" stranger "https://127.0.0.1:$secure"
attend etcd etcd --name test --data-dir "$STATE/etcd" \
  --listen-client-urls "http://127.0.0.1:$client" --advertise-client-urls "http://127.0.0.1:$client" \
  --listen-peer-urls "http://127.0.0.1:$peer" --initial-advertise-peer-urls "http://127.0.0.1:$peer" \
  --initial-cluster "test=http://127.0.0.1:$peer"
apiserver
while read -r command; do
  case $command in
  start) apiserver ;;
  stop)
    kill_all apiserver
    echo stopped
    ;;
  collect)
    attend controller-manager "$BIN/kube-controller-manager" --kubeconfig="$STATE/admin.kubeconfig" \
      --controllers=garbage-collector-controller --leader-elect=false --secure-port=0 --profiling=false
    echo collecting
    ;;
  *) die "there is no command $command" ;;
  esac
done
