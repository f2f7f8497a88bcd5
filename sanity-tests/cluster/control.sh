# The control plane of the test cluster: etcd, kube-apiserver, kube-controller-manager and kube-scheduler, in the machine's own network.
# shellcheck shell=bash
NET=${NET:-10.117.0} PODS=${PODS:-10.118} SERVICES=${SERVICES:-10.119.0} # first numbers of the addresses
API=$NET.1 PORT=${PORT:-6443} ETCD_PORT=${ETCD_PORT:-12379}
# shellcheck disable=SC2034 # node.sh uses it
PREFIX=bicluster BRIDGE=bicluster0 # names of links, namespaces and cgroups
ETCD_BIN=${ETCD_BIN:-etcd}
# What a kubelet sets for the whole machine; `down` puts it back.
SYSCTLS="vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops"

control_up() {
  local name
  for name in $SYSCTLS; do [ -s "$STATE/sysctl.$name" ] || sysctl -n "$name" >"$STATE/sysctl.$name"; done
  authority
  cert apiserver /CN=kube-apiserver "IP:127.0.0.1,IP:$API,IP:$SERVICES.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc"
  cert admin /O=system:masters/CN=admin
  kubeconfig "$STATE/admin.kubeconfig" admin "https://$API:$PORT"
  ip link show "$BRIDGE" >/dev/null 2>&1 || ip link add "$BRIDGE" type bridge
  ip addr replace "$API/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  # No kube-proxy stands here: the API server asks webhooks at their pods (--enable-aggregator-routing), and whatever else goes to a
  # service must not leave the machine.
  ip route replace unreachable "$SERVICES.0/24"
  local client="http://127.0.0.1:$ETCD_PORT" peer="http://127.0.0.1:$((ETCD_PORT + 1))"
  # shellcheck disable=SC2086 # flags are words
  {
    start etcd "$ETCD_BIN" --name test --data-dir "$STATE/etcd" --listen-client-urls "$client" --advertise-client-urls "$client" \
      --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" --initial-cluster "test=$peer" ${ETCD_FLAGS:-}
    start apiserver "$BIN/kube-apiserver" --etcd-servers="$client" --bind-address="$API" --advertise-address="$API" --secure-port="$PORT" \
      --service-cluster-ip-range="$SERVICES.0/24" --authorization-mode=Node,RBAC --allow-privileged=true --client-ca-file="$PKI/ca.crt" \
      --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" \
      --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$PKI/sa.key" \
      --service-account-signing-key-file="$PKI/sa.key" --kubelet-client-certificate="$PKI/admin.crt" \
      --kubelet-client-key="$PKI/admin.key" --kubelet-preferred-address-types=InternalIP \
      --enable-aggregator-routing=true --profiling=false ${APISERVER_FLAGS:-}
    await 120 "apiserver ready" k get --raw /readyz
    local quick=
    [ "${FAST:-0}" = 1 ] && quick="--node-monitor-period=1s --node-monitor-grace-period=8s"
    start controller-manager "$BIN/kube-controller-manager" --kubeconfig="$STATE/admin.kubeconfig" --root-ca-file="$PKI/ca.crt" \
      --service-account-private-key-file="$PKI/sa.key" --leader-elect=false --secure-port=0 --allocate-node-cidrs=false \
      --profiling=false --flex-volume-plugin-dir="$STATE/flex" $quick ${CONTROLLER_FLAGS:-}
    start scheduler "$BIN/kube-scheduler" --kubeconfig="$STATE/admin.kubeconfig" --leader-elect=false --secure-port=0 \
      --profiling=false ${SCHEDULER_FLAGS:-}
  }
}

control_down() {
  local name
  for name in scheduler controller-manager apiserver; do kill_all $name; done
  stop etcd 20
  ip route del unreachable "$SERVICES.0/24" 2>/dev/null || true
  for name in $SYSCTLS; do
    if [ -s "$STATE/sysctl.$name" ]; then
      sysctl -qw "$name=$(cat "$STATE/sysctl.$name")"
      rm -f "$STATE/sysctl.$name"
    fi
  done
}

# --- the CSI sidecars, as processes beside the control plane --------------
SIDECARS="snapshot-controller csi-provisioner csi-attacher csi-resizer csi-snapshotter"
sidecars() { # sidecars SOCKET
  local socket=$1 access="--kubeconfig=$STATE/admin.kubeconfig" kind=snapshot.storage.k8s.io
  k apply -f "$CACHE/crd" >/dev/null
  # `kubectl wait` fails at once on a kind so new that it has no conditions.
  await 30 "snapshot kinds" k wait --for=condition=Established --timeout=1s "crd/volumesnapshots.$kind" "crd/volumesnapshotcontents.$kind" "crd/volumesnapshotclasses.$kind"
  # shellcheck disable=SC2086 # flags are words
  {
    start snapshot-controller "$BIN/snapshot-controller" "$access" --leader-election=false --http-endpoint=""
    start csi-provisioner "$BIN/csi-provisioner" "$access" --csi-address="$socket" --default-fstype=ext4 --extra-create-metadata ${PROVISIONER_FLAGS:-}
    start csi-attacher "$BIN/csi-attacher" "$access" --csi-address="$socket" ${ATTACHER_FLAGS:-}
    start csi-resizer "$BIN/csi-resizer" "$access" --csi-address="$socket" ${RESIZER_FLAGS:-}
    start csi-snapshotter "$BIN/csi-snapshotter" "$access" --csi-address="$socket" ${SNAPSHOTTER_FLAGS:-}
  }
}
sidecars_down() {
  local name
  for name in $SIDECARS; do stop "$name"; done
}
