#!/usr/bin/env bash
# Renders deploy/chart into deploy/manifests, with helm as the test cluster builds it (sanity-tests/cluster/build.sh helm).
#
#   render.sh            renders
#   render.sh --check    lints the chart and compares: what `make e2e` and `make cluster-test` run
#
# deploy/manifests/SHA256SUMS holds the sums of what was rendered and of what it was rendered from. `cargo xtask ci generated` compares
# these, which needs neither helm nor a network: whoever changes the chart, the definitions or the manifests alone is told to render.
set -euo pipefail
cd "$(dirname "$0")/.."
CACHE=${CLUSTER_CACHE:-$PWD/target/cluster} OUT=deploy/manifests
. sanity-tests/cluster/versions.env
[ -x "$CACHE/bin/helm" ] || CLUSTER_CACHE=$CACHE sanity-tests/cluster/build.sh helm
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/manifests"

helm() { "$CACHE/bin/helm" "$@" 2>"$work/err" || { cat "$work/err" >&2; exit 1; }; }
template() { helm template backing-image-csi deploy/chart --namespace longhorn-system --kube-version "$KUBE" "$@"; }
# Definitions first: `kubectl apply -f FOLDER` goes by name.
for crd in deploy/crds/*.yaml; do
  echo "---"
  cat "$crd"
done >"$work/manifests/1-definitions.yaml"
{
  echo "# Rendered from deploy/chart by deploy/render.sh; change it there."
  template --set createNamespace=true
} >"$work/manifests/2-driver.yaml"
{
  find deploy/chart deploy/crds -type f -print0
  printf 'deploy/render.sh\0sanity-tests/cluster/versions.env\0'
} | sort -z | xargs -0 sha256sum >"$work/sums"
(cd "$work" && sha256sum manifests/*.yaml | sed 's|  |  deploy/|') >>"$work/sums"
mv "$work/sums" "$work/manifests/SHA256SUMS"

if [ "${1:-}" = --check ]; then
  helm lint --strict --quiet --kube-version "$KUBE" deploy/chart
  # All that can be switched on is YAML, too.
  template --set sidecars.snapshotter.enabled=true,storageClass.default=true \
    --set 'networkPolicies.metricsFrom[0].namespaceSelector.matchLabels.name=monitoring,imagePullSecrets[0].name=registry' >/dev/null
  diff -r "$work/manifests" $OUT || { echo "render.sh: deploy/manifests is not what deploy/chart renders to: run deploy/render.sh" >&2; exit 1; }
  echo "render: the chart lints, and deploy/manifests is fresh"
else
  mkdir -p $OUT
  cp "$work"/manifests/* $OUT/
  echo "render: $(wc -l <$OUT/2-driver.yaml) lines"
fi
