# One image, one binary: every role is a subcommand of it. deploy/image/build.sh makes the same without docker.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN scripts/install-packages.sh build && cargo build --release --locked
# What the roles start, and the libraries that it needs; no package manager, no Python.
RUN deploy/image/rootfs.sh target/release/backing-image-csi /rootfs

FROM scratch
COPY --from=build /rootfs /
# Roles that need more are given root by their pods (deploy/chart).
USER 57345
ENTRYPOINT ["/usr/local/bin/backing-image-csi"]
