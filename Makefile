# Two commands for newcomers; everything else is `cargo xtask`.

.PHONY: quickstart build test cluster-test image

# Shows the main job on this machine, without Kubernetes. IMAGE_URL=… takes an image of yours.
quickstart: build
	scripts/quickstart.sh

build:
	scripts/install-packages.sh build runtime quickstart
	cargo build --release --locked

# All that CI runs (.ci/run calls it).
test:
	scripts/install-packages.sh build runtime quickstart test
	cargo xtask ci

# A real Kubernetes on this machine (sanity-tests/cluster; builds it first, about 20 minutes when cold), and the store against its API server.
cluster-test:
	scripts/install-packages.sh build runtime cluster
	sanity-tests/cluster/build.sh kube tools
	REQUIRE_REAL=1 cargo test --locked -p backing-image-store --test kubernetes -- --include-ignored
	REQUIRE_REAL=1 cargo test --locked -p backing-image-controller --test webhook -- --ignored
	sanity-tests/cluster/check.sh

image:
	docker build -t backing-image-csi .
