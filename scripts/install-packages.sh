#!/bin/bash
# Installs the Debian packages of the named sections of deploy/packages.txt, those that are missing only.
# Usage: scripts/install-packages.sh SECTION...
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || { echo "usage: $0 SECTION...  (sections of deploy/packages.txt)" >&2; exit 2; }

wanted=()
for section in "$@"; do
  found=$(awk -v want="[$section]" '/^\[/ { inside = ($1 == want); next } inside && NF && $1 !~ /^#/ { print $1 }' deploy/packages.txt)
  [ -n "$found" ] || { echo "deploy/packages.txt has no section [$section]" >&2; exit 2; }
  mapfile -t -O "${#wanted[@]}" wanted <<<"$found"
done

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "This is not a Debian system. Install what these packages contain, then go on without this step: ${wanted[*]}" >&2
  exit 1
fi

missing=()
for package in "${wanted[@]}"; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "packages: all ${#wanted[@]} are there ($*)"
  exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "These packages are missing: ${missing[*]}" >&2
  echo "Installing them needs root. Run as root: apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 1
fi
echo "packages: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq </dev/null
apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" </dev/null >/dev/null
