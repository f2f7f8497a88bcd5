#!/usr/bin/env bash
# The main job on one machine, without Kubernetes: a qcow2 image becomes a volume with three replicas, is mounted, written,
# moved to another node, and everything is cleaned up again.
#
#   scripts/quickstart.sh                          a small image that is made here
#   IMAGE_URL=https://… scripts/quickstart.sh      an image of yours (IMAGE_CHECKSUM, IMAGE_SIZE=10Gi, IMAGE_MODE=Block as needed)
#
# BINARY names another binary, KEEP=1 leaves everything running at the end.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
binary=${BINARY:-$root/target/release/backing-image-csi}
work=$(mktemp -d /tmp/backing-image-quickstart.XXXXXX)
data=$work/data
claim=longhorn-backing-image-example
pids=()
began=$SECONDS

say() { printf '\n\033[1m[%3ds] %s\033[0m\n' "$((SECONDS - began))" "$*"; }
show() { printf '  $ backing-image-csi %s\n' "$*"; run "$@" | sed 's/^/    /'; }
run() { "$binary" "$@"; }
fail() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }

left_over() {
  grep -F " $work" /proc/self/mountinfo || true
  grep -lsF "$work" /sys/block/loop*/loop/backing_file || true
  for process in /proc/[0-9]*; do
    [ "$process" = "/proc/$$" ] && continue
    tr '\0' ' ' 2>/dev/null <"$process/cmdline" | grep -F "$work/" | grep -v '^grep ' || true
  done
}

cleanup() {
  local status=$?
  trap - EXIT
  if [ "$status" -ne 0 ] && [ -f "$work/standalone.log" ]; then
    printf '\nquickstart failed; the end of %s:\n' "$work/standalone.log" >&2
    tail -n 30 "$work/standalone.log" >&2
    "$binary" why pvc "$claim" >&2 || true
  fi
  [ -d "$data" ] && { "$binary" standalone stop --data "$data" --all >"$work/stop.log" 2>&1 || status=1; }
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true; done
  local left
  left=$(left_over)
  if [ -n "$left" ]; then
    printf 'left over:\n%s\n' "$left" >&2
    cat "$work/stop.log" >&2 || true
    exit 1
  fi
  [ "$status" -eq 0 ] && rm -rf "$work" || printf 'kept for you to look at: %s\n' "$work" >&2
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
trap 'exit 130' INT
trap 'exit 143' TERM

[ -x "$binary" ] || fail "there is no $binary; run \`make quickstart\`, which builds it"
[ "$(id -u)" = 0 ] || fail "mounting needs root; run it with sudo"

wait_for_file() {
  for _ in $(seq 300); do
    [ -s "$1" ] && return
    kill -0 "$2" 2>/dev/null || fail "process $2 ended early"
    sleep 0.1
  done
  fail "$1 did not appear within 30 s"
}

if [ -z "${IMAGE_URL:-}" ]; then
  say "Making an image: an ext4 filesystem with files, as compressed qcow2"
  mkdir -p "$work/files/docs" "$work/www"
  echo "hello from the image" >"$work/files/hello.txt"
  cp "$root"/*.md "$work/files/docs/"
  head -c 24M /dev/urandom >"$work/files/random.bin"
  truncate -s 128M "$work/image.raw"
  mke2fs -q -t ext4 -d "$work/files" "$work/image.raw"
  qemu-img convert -f raw -O qcow2 -c "$work/image.raw" "$work/www/image.qcow2"
  rm "$work/image.raw"
  IMAGE_CHECKSUM=$(sha512sum "$work/www/image.qcow2" | cut -d' ' -f1)
  "$binary" serve "$work/www" --address-file "$work/www.address" >/dev/null 2>"$work/www.log" &
  pids+=($!)
  wait_for_file "$work/www.address" "${pids[-1]}"
  IMAGE_URL=$(cat "$work/www.address")/image.qcow2
  own=1
fi
printf '    %s\n' "$IMAGE_URL"

say "Starting a standalone instance: 3 nodes with one disk each"
"$binary" standalone --data "$data" --nodes 3 --listen 127.0.0.1:0 >"$work/standalone.log" 2>&1 &
pids+=($!)
wait_for_file "$data/ready" "${pids[-1]}"
BACKING_IMAGE_CSI_SERVER=$(cat "$data/ready")
export BACKING_IMAGE_CSI_SERVER
show get nodes

say "Applying a StorageClass and a claim (deploy/examples, with the image's URL and checksum)"
sed -e "s|https://backing-image-example.s3-region.amazonaws.com/test-backing-image|$IMAGE_URL|" \
  -e "s|SHA512 checksum of the backing image|${IMAGE_CHECKSUM:-}|" \
  -e '/backingImageChecksum: ""/d' "$root/deploy/examples/storage-class.yaml" >"$work/storage-class.yaml"
sed -e "s|256Mi|${IMAGE_SIZE:-256Mi}|" "$root/deploy/examples/pvc.yaml" >"$work/pvc.yaml"
[ "${IMAGE_MODE:-Filesystem}" = Block ] && sed -i 's|^spec:|spec:\n  volumeMode: Block|' "$work/pvc.yaml"
show apply -f "$work/storage-class.yaml" -f "$work/pvc.yaml"

if [ "${IMAGE_MODE:-Filesystem}" = Block ]; then
  say "Attaching it to node-1 as a block device (copies the image to the disks of its replicas first)"
  device=$(run volume attach "$claim" --node node-1)
  blkid -p "$device" || true
  lsblk "$device" 2>/dev/null || true
else
  say "Mounting it on node-1 (copies the image to the disks of its replicas first)"
  mkdir "$work/mnt1" "$work/mnt2"
  show volume mount "$claim" --node node-1 "$work/mnt1"
  # shellcheck disable=SC2012
  ls -l "$work/mnt1" | head -20 | sed 's/^/    /'
  [ -z "${own:-}" ] || grep -q "hello from the image" "$work/mnt1/hello.txt" || fail "the image's file is not in the volume"
  echo "written on node-1" >"$work/mnt1/note.txt"
  sync -f "$work/mnt1/note.txt"

  say "Detaching it and mounting it on node-2"
  show volume detach "$claim"
  show volume mount "$claim" --node node-2 "$work/mnt2"
  printf '    note.txt: %s\n' "$(cat "$work/mnt2/note.txt")"
  [ "$(cat "$work/mnt2/note.txt")" = "written on node-1" ] || fail "the file that was written on node-1 is not there"
  if [ -n "${own:-}" ]; then
    cmp "$work/files/random.bin" "$work/mnt2/random.bin" || fail "the image's content differs"
  fi
fi

say "The volume, and the copies of the image on every disk"
show volume list
show image list
digest=$(run get backingimage bi-download -o json | sed -n 's/^ *"checksum": "\([0-9a-f]\{128\}\)".*/\1/p' | tail -1)
for copy in "$data"/nodes/*/disk-1/backing-images/*/backing; do
  printf '%s  %s\n' "$digest" "$copy"
done | sha512sum --check --quiet && echo "    sha512sum agrees with every copy on disk"
show why pvc "$claim"

if [ -n "${KEEP:-}" ]; then
  say "Left running. Use: export BACKING_IMAGE_CSI_SERVER=$BACKING_IMAGE_CSI_SERVER"
  printf '    end it with: %s standalone stop --data %s --all\n' "$binary" "$data"
  trap - EXIT
  exit 0
fi

say "Cleaning up"
show volume detach "$claim"
show delete pvc "$claim"
show delete backingimage bi-download
run standalone stop --data "$data" --all 2>"$work/stop.log" | sed 's/^/    /' || { cat "$work/stop.log" >&2; exit 1; }
for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; done
pids=()
[ -z "$(left_over)" ] || fail "something is left: $(left_over)"
echo "    no process, mount or loop device is left"
say "Done"
