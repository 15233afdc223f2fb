#!/usr/bin/env bash
# The tests of the report page look at it in a real browser. Installs Debian's chromium if there is none,
# as root or in CI (CI=1) only; otherwise says what to do.
set -euo pipefail

for browser in chromium chromium-browser google-chrome; do
    if command -v "$browser" >/dev/null; then
        exit 0
    fi
done

command="apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium"
if ! command -v apt-get >/dev/null; then
    echo "No Chromium found, and no apt-get to install it: install Chromium, then repeat." >&2
    exit 2
fi
if ((EUID == 0)); then
    echo "Installing chromium (Debian package)"
    bash -c "$command" >/dev/null
elif [[ -n ${CI:-} ]] && sudo -n true 2>/dev/null; then
    echo "Installing chromium (Debian package, with sudo)"
    sudo bash -c "$command" >/dev/null
else
    echo "No Chromium found. Install it, then repeat: sudo bash -c '$command'" >&2
    exit 2
fi
