#!/usr/bin/env bash
# Builds the image without docker and without a registry: an OCI archive for `ctr -n k8s.io images import`, `podman load` or
# `skopeo copy oci-archive:…`.
#
#   build.sh [-b BINARY] [-r REFERENCE] [-o ARCHIVE]
#
# BINARY: target/release/backing-image-csi. REFERENCE: backing-image-csi:VERSION, what the chart names by default.
# The Debian part is kept in target/image and made anew when rootfs.sh or the list of packages changed, or when it is older than
# MAX_AGE_DAYS (30), for the sake of security updates.
set -euo pipefail
ROOT=$(realpath "$(dirname "$0")/../..")
cd "$ROOT"
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -1)
binary=target/release/backing-image-csi reference=backing-image-csi:$version archive=
while getopts b:r:o: option; do
  case $option in
  b) binary=$OPTARG ;;
  r) reference=$OPTARG ;;
  o) archive=$OPTARG ;;
  *) sed -n '2,9s/^# \?//p' "$0" >&2; exit 2 ;;
  esac
done
cache=${IMAGE_CACHE:-$ROOT/target/image}
mkdir -p "$cache"
archive=${archive:-$cache/backing-image-csi.tar}
exec 9>"$cache/lock"
flock 9

mkimage=${CLUSTER_CACHE:-$ROOT/target/cluster}/bin/mkimage
if [ ! -x "$mkimage" ]; then
  mkimage=$cache/mkimage
  (cd sanity-tests && CGO_ENABLED=0 go build -buildvcs=false -o "$mkimage" ./cluster/cmd/mkimage)
fi

key=$(cat deploy/image/rootfs.sh deploy/packages.txt ${SOURCES:+"$SOURCES"} <(readelf -d "$binary" | grep NEEDED) | sha256sum | cut -c1-16)
root=$cache/rootfs-$key
if [ ! -d "$root" ] || [ -n "$(find "$root" -maxdepth 0 -mtime "+${MAX_AGE_DAYS:-30}")" ]; then
  find "$cache" -maxdepth 1 -name 'rootfs-*' -exec rm -rf {} +
  deploy/image/rootfs.sh "$binary" "$root.new"
  rm -f "$root.new/usr/local/bin/backing-image-csi"
  mv "$root.new" "$root"
fi
# Symbols are for people who debug; the release profile says what it keeps.
"$mkimage" -o "$archive" -ref "$reference" -user 57345 -entrypoint /usr/local/bin/backing-image-csi \
  -add "$root=/" -add "$binary=/usr/local/bin/backing-image-csi"
echo "image: $archive, $(($(stat -c %s "$archive") >> 20)) MiB, $reference"
