# Two commands for newcomers; everything else is `cargo xtask`.

.PHONY: quickstart build test image

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

image:
	docker build -t backing-image-csi .
