# Two commands for newcomers; everything else is `cargo xtask`.

.PHONY: quickstart build test cluster-test e2e image

# Shows the main job on this machine, without Kubernetes. IMAGE_URL=… takes an image of yours.
quickstart: build
	scripts/quickstart.sh

build:
	scripts/install-packages.sh build runtime quickstart
	cargo build --release --locked

# All that CI runs (.ci/run calls it).
test:
	scripts/install-packages.sh build runtime quickstart test cluster
	cargo xtask ci

# A real Kubernetes on this machine (sanity-tests/cluster; builds it first, about 20 minutes when cold), and the store against its API server.
cluster-test:
	scripts/install-packages.sh build runtime cluster
	sanity-tests/cluster/build.sh kube tools
	REQUIRE_REAL=1 cargo test --locked -p backing-image-store --test kubernetes -- --include-ignored
	REQUIRE_REAL=1 cargo test --locked -p backing-image-workloads --test pods -- --ignored
	REQUIRE_REAL=1 cargo test --locked -p backing-image-controller --test webhook --test leader -- --ignored
	REQUIRE_REAL=1 cargo test --locked -p backing-image-csi --test metrics --test probes -- --ignored
	sanity-tests/cluster/check.sh

# The driver as users install it, on a Kubernetes with two nodes, through the official sidecars and real pods (sanity-tests/e2e).
# The first run builds the cluster; FLOWS=TestBlock runs some of them, KEEP=1 leaves the cluster.
e2e:
	scripts/install-packages.sh build runtime cluster
	cargo build --release --locked
	deploy/render.sh --check
	cd sanity-tests/e2e && go vet ./... && go test -count=1 -timeout=60m -v $(if $(FLOWS),-run '$(FLOWS)') .

image:
	docker build -t backing-image-csi .
