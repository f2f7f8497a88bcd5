# One image, one binary: every role is a subcommand of it.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN scripts/install-packages.sh build && cargo build --release --locked

FROM debian:12-slim
COPY deploy/packages.txt /tmp/packages/deploy/packages.txt
COPY scripts/install-packages.sh /tmp/packages/scripts/install-packages.sh
RUN /tmp/packages/scripts/install-packages.sh runtime && rm -rf /tmp/packages /var/lib/apt/lists/*
COPY --from=build /src/target/release/backing-image-csi /usr/local/bin/backing-image-csi
# Called by this name it is Longhorn's tool of the same name.
RUN ln -s backing-image-csi /usr/local/bin/backing-image-manager
ENTRYPOINT ["/usr/local/bin/backing-image-csi"]
