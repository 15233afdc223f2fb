#!/usr/bin/env bash
# Programs that `make test-real` needs besides Python: a browser that looks at the pages, bubblewrap for the sandbox, npm
# which brings the OpenCode server and clients of ours, curl which editors ask with, a compiler for llama.cpp. Installs
# Debian's packages of what is missing, as root or in CI (CI=1) only; otherwise says what to do.
set -euo pipefail

missing=()
need() { # PACKAGE PROGRAM...: any of the programs will do
    local package=$1 program
    for program in "${@:2}"; do
        if command -v "$program" >/dev/null; then return 0; fi
    done
    missing+=("$package")
}
need chromium chromium chromium-browser google-chrome
need bubblewrap bwrap
need npm npm
need curl curl
need g++ c++ g++ clang++
((${#missing[@]})) || exit 0

command="apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ${missing[*]}"
if ! command -v apt-get >/dev/null; then
    echo "Not installed: ${missing[*]}, and no apt-get to install them: install them, then repeat." >&2
    exit 2
fi
if ((EUID == 0)); then
    echo "Installing ${missing[*]} (Debian packages)"
    bash -c "$command" >/dev/null
elif [[ -n ${CI:-} ]] && sudo -n true 2>/dev/null; then
    echo "Installing ${missing[*]} (Debian packages, with sudo)"
    sudo bash -c "$command" >/dev/null
else
    echo "Not installed: ${missing[*]}. Install them, then repeat: sudo bash -c '$command'" >&2
    exit 2
fi
