#!/usr/bin/env bash
# Installs the Debian packages that the tests need, those that are missing only.
set -euo pipefail

declare -A needs=(
    [gcc]=gcc [python3]=python3 [setpriv]=util-linux [mount]=mount
    [redis-server]=redis-server [redis-cli]=redis-tools [javac]=openjdk-17-jdk-headless
)
missing=()
for program in "${!needs[@]}"; do
    command -v "$program" >/dev/null || missing+=("${needs[$program]}")
done
[ -e /usr/include/stdio.h ] || missing+=(libc6-dev)
# gcc finds its own copy of this only with the package.
if command -v gcc >/dev/null && ! echo 'int main(void){return 0;}' | gcc -fopenmp -x c - -o /dev/null 2>/dev/null; then
    missing+=(libgomp1 libc6-dev gcc)
fi
if [ ${#missing[@]} -eq 0 ]; then
    echo "everything the tests need is here"
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "skipped: not root, cannot install: ${missing[*]} (tests that need them will fail or be skipped)" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update
# Another JDK will do where Debian has none of this version.
if ! apt-get install -y --no-install-recommends "${missing[@]}"; then
    apt-get install -y --no-install-recommends "${missing[@]/openjdk-17-jdk-headless/default-jdk-headless}"
fi
