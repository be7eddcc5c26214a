#!/bin/sh
# Builds the blob for aarch64, tests it with the stub and the signal frame under qemu-user, and checks
# that everything else compiles there. What needs ptrace cannot be tested: qemu-user has none.
#
# On Debian: dpkg --add-architecture arm64; apt-get install --no-install-recommends rustc-web
# libstd-rust-web-dev:arm64 gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
set -eu
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu

skip() {
    echo "skipped ($1)"
    exit 0
}

for rustc in "${RUSTC:-rustc}" /usr/bin/rustc ''; do
    [ -n "$rustc" ] || skip "no rustc has a standard library for $target"
    libdir=$("$rustc" --print target-libdir --target "$target" 2>/dev/null) || continue
    [ -n "$(find "$libdir" -name 'libstd-*.rlib' 2>/dev/null)" ] && break
done
for tool in aarch64-linux-gnu-gcc qemu-aarch64; do
    command -v "$tool" >/dev/null || skip "no $tool"
done

export RUSTC="$rustc"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/aarch64"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
# Without -L: with two C libraries a program hangs at its first thread.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER='timeout 60 qemu-aarch64'

cargo build --target "$target" -p torpor-blob
cargo test --target "$target" --lib --tests -p torpor-arch-aarch64 -p torpor-blob -p torpor-parasite
cargo check --target "$target" -p torpor-image -p torpor-kernel -p torpor-dumper -p torpor-restorer -p torpor
