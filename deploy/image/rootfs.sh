#!/usr/bin/env bash
# Makes the root of the image: what the roles start, from the Debian packages of deploy/packages.txt (section runtime), and the
# libraries that it needs. Nothing else of those packages: no Python, no package manager.
#
#   rootfs.sh BINARY FOLDER
#
# Packages come by apt-get from this machine's sources with their signatures checked (SOURCES=FILE: those of a sources file instead,
# for example of snapshot.debian.org). Needs no root and changes nothing on this machine. With the same packages the same comes out;
# their versions stand in usr/share/backing-image-csi/packages.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# = 2 ] || { echo "usage: $0 BINARY FOLDER" >&2; exit 2; }
BINARY=$(realpath "$1") ROOT=$(realpath -m "$2")
WORK=$ROOT.work
die() { echo "rootfs.sh: $*" >&2; exit 1; }

# What roles start (dataplane/src), and what a person needs who looks for something in a container.
PROGRAMS=(qemu-storage-daemon qemu-img mkfs.ext4 mke2fs e2fsck resize2fs dumpe2fs mkfs.xfs xfs_growfs xfs_repair
  blkid losetup blockdev lsblk findmnt mount umount bash ls cat cp mv rm df du stat env id sleep sha512sum head tail)
# What they load by name.
LIBRARIES=(libjemalloc.so.2)
# Files that are no programs; a folder is taken whole.
FILES=(etc/mke2fs.conf etc/os-release usr/lib/os-release usr/share/ca-certificates)
PACKAGES=(base-files bash coreutils)

for tool in apt-get dpkg-deb readelf; do
  command -v "$tool" >/dev/null || die "$tool is missing: this needs Debian with binutils (scripts/install-packages.sh build)"
done
[ -x "$BINARY" ] || die "$BINARY is no program: build it with cargo build --release"
while read -r package; do PACKAGES+=("$package"); done < <(awk '/^\[/ { inside = ($1 == "[runtime]"); next } inside && NF && $1 !~ /^#/ { print $1 }' deploy/packages.txt)

# --- packages: what an empty system would need, by apt's own reckoning --------
rm -rf "$ROOT" "$WORK"
mkdir -p "$WORK"/{state/lists/partial,cache/archives/partial,all}
trap 'rm -rf "$WORK"' EXIT
: >"$WORK/status"
apt=(apt-get -qq -o Dir::State="$WORK/state" -o Dir::State::status="$WORK/status" -o Dir::Cache="$WORK/cache"
  -o Debug::NoLocking=1 -o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none -o Acquire::Retries=3)
if [ -n "${SOURCES:-}" ]; then apt+=(-o Dir::Etc::sourcelist="$(realpath "$SOURCES")" -o Dir::Etc::sourceparts=-); fi
"${apt[@]}" update
"${apt[@]}" --no-install-recommends --download-only -y install "${PACKAGES[@]}" >/dev/null
# One tree, as the packages of a system whose /bin is a link to usr/bin.
mkdir -p "$WORK"/all/usr/{bin,sbin,lib,lib64}
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$WORK/all/$folder"; done
for package in "$WORK"/cache/archives/*.deb; do
  dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink --no-same-owner -C "$WORK/all"
  # shellcheck disable=SC2016 # dpkg-deb replaces these
  dpkg-deb -W --showformat='${Package} ${Version} ${Architecture}\n' "$package"
done | sort >"$WORK/versions"

# --- of these: the programs, and what they need --------------------------------
cd "$WORK/all"
# take PATH: a file with the links on the way to it, and the libraries that it names.
take() {
  local path=$1 target
  [ -e "$path" ] || [ -L "$path" ] || die "no package has $path"
  [ ! -e "$ROOT/$path" ] || return 0
  mkdir -p "$ROOT/${path%/*}"
  if [ -L "$path" ]; then
    target=$(readlink "$path")
    cp -P "$path" "$ROOT/$path"
    case $target in /*) take "${target#/}" ;; *) take "$(realpath -m --relative-to=. "${path%/*}/$target")" ;; esac
    return
  fi
  # Nothing in the image gives rights that its user does not have.
  install -m "$(stat -c '%a' "$path" | tail -c 4)" -p "$path" "$ROOT/$path"
  needs "$path"
}
needs() { # needs ELF
  local name
  for name in $(readelf -d "$1" 2>/dev/null | sed -n 's/.*(NEEDED).*\[\(.*\)\]$/\1/p'); do take "$(library "$name")"; done
  for name in $(readelf -l "$1" 2>/dev/null | sed -n 's|.*interpreter: /\(.*\)\]$|\1|p'); do take "usr/$name"; done
}
library() {
  local found
  for found in usr/lib/*-linux-gnu/"$1" usr/lib64/"$1" usr/lib/"$1"; do
    if [ -e "$found" ]; then echo "$found"; return; fi
  done
  die "no package has the library $1: its package is missing in deploy/packages.txt, section runtime"
}
mkdir -p "$ROOT"/usr/{bin,sbin,lib,lib64} "$ROOT"/{etc/ssl/certs,root,run,tmp,data,csi,var/lib,var/tmp,proc,sys,dev}
chmod 1777 "$ROOT/tmp" "$ROOT/var/tmp"
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$ROOT/$folder"; done
for program in "${PROGRAMS[@]}"; do
  if [ -e "usr/bin/$program" ] || [ -L "usr/bin/$program" ]; then take "usr/bin/$program"; else take "usr/sbin/$program"; fi
done
for name in "${LIBRARIES[@]}"; do take "$(library "$name")"; done
for path in "${FILES[@]}"; do
  mkdir -p "$ROOT/$(dirname "$path")"
  cp -a "$path" "$ROOT/$path"
done
ln -s bash "$ROOT/usr/bin/sh"
needs "$BINARY"

# --- ours ---------------------------------------------------------------------
mkdir -p "$ROOT/usr/local/bin" "$ROOT/usr/share/backing-image-csi"
install -m 0755 "$BINARY" "$ROOT/usr/local/bin/backing-image-csi"
# Called by this name it is Longhorn's tool of the same name.
ln -s backing-image-csi "$ROOT/usr/local/bin/backing-image-manager"
cp "$WORK/versions" "$ROOT/usr/share/backing-image-csi/packages"
# The package would do this when it is installed.
find usr/share/ca-certificates -name '*.crt' | sort | xargs cat >"$ROOT/etc/ssl/certs/ca-certificates.crt"
rm -rf "$ROOT/usr/share/ca-certificates"
printf 'root:x:0:0:root:/root:/bin/sh\nbacking-image-csi:x:57345:57345:roles that need no privileges:/:/usr/sbin/nologin\n' >"$ROOT/etc/passwd"
printf 'root:x:0:\nbacking-image-csi:x:57345:\n' >"$ROOT/etc/group"
printf 'hosts: files dns\n' >"$ROOT/etc/nsswitch.conf"
echo "rootfs: $(du -sm "$ROOT" | cut -f1) MiB, of $(wc -l <"$WORK/versions") packages"
