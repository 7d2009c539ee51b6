#!/usr/bin/env bash
# Puts Debian's chromium on this machine, for the tests that look at pages. Needs root and apt.
set -euo pipefail
command -v chromium >/dev/null && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "chromium is missing, and only root on Debian can add it"; exit 1; }
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium >/dev/null
