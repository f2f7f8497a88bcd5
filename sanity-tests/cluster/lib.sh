# Shared by the scripts beside it: where things are, processes that are found again whatever happened, certificates.
# shellcheck shell=bash
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(realpath "$HERE/../..")
# What is built: kept between runs and between machines. What runs: its data, logs and sockets.
CACHE=$(realpath -m "${CLUSTER_CACHE:-$ROOT/target/cluster}")
STATE=$(realpath -m "${CLUSTER_STATE:-/var/lib/backing-image-cluster}")
BIN=$CACHE/bin LOG=$STATE/log PKI=$STATE/pki
# shellcheck source=versions.env
. "$HERE/versions.env"

die() { echo "${0##*/}: $*" >&2; exit 1; }
now() { date +%s%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f", (b - a) / 1e9 }'; }

# A socket's path has 107 characters at most, and those of the kubelet lie deep.
[ ${#STATE} -le 40 ] || die "CLUSTER_STATE=$STATE has ${#STATE} characters, at most 40 leave room for the sockets below it: choose a shorter one"
[[ $STATE =~ ^/[A-Za-z0-9._/-]+$ ]] || die "CLUSTER_STATE=$STATE must be of A-Z a-z 0-9 . _ - and not be /"

# --- processes ------------------------------------------------------------
# Each carries TAG=$STATE:NAME in its environment. There is no record of pids that could be missing after kill -9 of a script, or
# name a process of somebody else.
TAG=BACKING_IMAGE_CLUSTER

# tagged [NAME]: the pids of that name, or of all names; with the processes that these started.
tagged() {
  local match="^$TAG=${STATE//./\\.}:${1:-}"
  [ -z "${1:-}" ] || match+='$'
  # Processes come and go while it looks.
  { grep -lze "$match" /proc/[0-9]*/environ 2>/dev/null || true; } | cut -d/ -f3
}
# pid_of NAME: the process itself; it leads its session, what it started does not.
pid_of() {
  local pid session
  for pid in $(tagged "$1"); do
    read -r _ _ _ session _ < <(sed 's/^.*) //' "/proc/$pid/stat" 2>/dev/null) || continue
    if [ "$session" = "$pid" ]; then
      echo "$pid"
      return
    fi
  done
  return 1
}
names() { # of all that run
  local pid
  for pid in $(tagged); do
    { tr '\0' '\n' <"/proc/$pid/environ" || true; } 2>/dev/null | sed -n "s|^$TAG=$STATE:||p"
  done | sort -u
}
alive() { pid_of "$1" >/dev/null; }
# start NAME COMMAND...: in the background, unless it runs; its log is $LOG/NAME.log. It holds none of our locks.
start() {
  local name=$1
  shift
  alive "$name" && return
  mkdir -p "$LOG"
  env "$TAG=$STATE:$name" setsid nohup "$@" </dev/null >>"$LOG/$name.log" 2>&1 9>&- &
  disown $!
}
# stop NAME [SECONDS]: asks, and kills what has not ended by then.
stop() {
  local pid i
  pid=$(pid_of "$1") || return 0
  kill "$pid" 2>/dev/null
  for ((i = 0; i < ${2:-10} * 10; i++)); do
    alive "$1" || return 0
    sleep 0.1
  done
  pid=$(pid_of "$1") && kill -9 "$pid" 2>/dev/null
  return 0
}
# kill_all [NAME]: every process of that name or of ours, and what it started, until none is left.
kill_all() {
  local i pids
  for ((i = 0; i < 200; i++)); do
    pids=$(tagged "${1:-}")
    [ -n "$pids" ] || return 0
    # shellcheck disable=SC2086 # one word for each pid
    kill -9 $pids 2>/dev/null || true
    sleep 0.05
  done
  die "these processes do not end: $pids"
}
# await SECONDS WHAT COMMAND...: until it succeeds.
await() {
  local limit=$1 what=$2 began
  shift 2
  began=$(now)
  until "$@" >/dev/null 2>&1; do
    [ $(($(now) - began)) -lt $((limit * 1000000000)) ] || die "waited $limit s in vain for $what; see $LOG"
    sleep 0.2
  done
  echo "$what: $(since "$began") s"
}

# --- certificates ---------------------------------------------------------
authority() {
  mkdir -p "$PKI"
  chmod 700 "$PKI"
  [ -s "$PKI/ca.crt" ] || openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -sha256 \
    -subj /CN=test-cluster -keyout "$PKI/ca.key" -out "$PKI/ca.crt" 2>/dev/null
  [ -s "$PKI/sa.key" ] || openssl genrsa -out "$PKI/sa.key" 2048 2>/dev/null
}
# cert NAME SUBJECT [ALTERNATIVE NAMES]
cert() {
  [ -s "$PKI/$1.crt" ] && return
  openssl ecparam -genkey -name prime256v1 -noout -out "$PKI/$1.key" 2>/dev/null
  openssl req -new -key "$PKI/$1.key" -subj "$2" -out "$PKI/$1.csr" 2>/dev/null
  # The name without a suffix appears when it is whole.
  openssl x509 -req -in "$PKI/$1.csr" -CA "$PKI/ca.crt" -CAkey "$PKI/ca.key" -CAcreateserial -days 365 -sha256 \
    -extfile <(printf 'extendedKeyUsage=clientAuth,serverAuth\n%s\n' "${3:+subjectAltName=$3}") -out "$PKI/$1.new" 2>/dev/null
  mv "$PKI/$1.new" "$PKI/$1.crt"
  rm -f "$PKI/$1.csr"
}
# kubeconfig FILE CERT SERVER
kubeconfig() {
  cat >"$1" <<E
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "$3", certificate-authority: "$PKI/ca.crt"}}]
users: [{name: me, user: {client-certificate: "$PKI/$2.crt", client-key: "$PKI/$2.key"}}]
contexts: [{name: test, context: {cluster: test, user: me}}]
current-context: test
E
}
k() { "$BIN/kubectl" --kubeconfig "$STATE/admin.kubeconfig" "$@"; }
