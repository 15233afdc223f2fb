#!/usr/bin/env bash
# Make an NVIDIA GPU usable for training on Debian or Ubuntu.
#
#   scripts/setup_cuda.sh [--dry-run] [--yes]
#
#   --dry-run   print what is there and what would be done, and stop
#   --yes       do it without asking
#
# Looks first (GPU, driver, compiler, PyTorch's build), then says what is missing, then asks. It installs
# the driver from the distribution's own packages and PyTorch into .venv; it adds no package sources.
# A driver older than PyTorch's default build needs another build: TORCH_INDEX_URL=... names where its
# wheels are (PyTorch's "Get Started" page prints the address).
#
# Exit codes: 0 all is well or was done, 1 declined or failed, 2 nothing that this script can do.
set -euo pipefail
cd "$(dirname "$0")/.."

# Oldest drivers by major version: CUDA 13 needs 580, every CUDA 12 runs on 525 (minor-version compatibility).
cuda13_driver=580
cuda12_driver=525
# CUDA 13 compiles for Turing (RTX 20) and later; 12.6 is the last with Pascal and Volta (GTX 10, V100).
cuda13_capability=75

dry_run=0
yes=0
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=1 ;;
        --yes) yes=1 ;;
        -h | --help)
            sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "scripts/${0##*/}"
            exit 0
            ;;
        *)
            echo "setup_cuda: unknown option $argument: known are --dry-run, --yes, --help" >&2
            exit 2
            ;;
    esac
done

stop() { # MESSAGE: nothing that this script can do
    echo "setup_cuda: $1" >&2
    exit 2
}

# --- what is there ---------------------------------------------------------------------------------------

has_gpu_on_bus() { # NVIDIA is PCI vendor 10de; class 03.... is a display controller
    local device
    for device in "${PCI_DEVICES:-/sys/bus/pci/devices}"/*; do
        if grep -qi 10de "$device/vendor" 2>/dev/null && grep -q '^0x03' "$device/class" 2>/dev/null; then
            return 0
        fi
    done
    return 1
}

# shellcheck disable=SC1090,SC1091  # the system's own description of itself
system=$(. "${OS_RELEASE:-/etc/os-release}" 2>/dev/null && echo "${ID:-} ${ID_LIKE:-}") || system=
case " $system " in
    *" ubuntu "*) system=ubuntu ;;
    *" debian "*) system=debian ;;
    *) stop "this is neither Debian nor Ubuntu: install NVIDIA's driver ($cuda13_driver or later) your system's way, then \`make setup\`" ;;
esac

driver=0
actions=() # each one line of shell
notes=()
if query=$(nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader 2>&1); then
    while IFS=, read -r name version capability memory; do
        echo "GPU: $name, driver${version}, compute capability${capability},${memory}"
    done <<<"$query"
    IFS=', ' read -r driver capability <<<"$(head -n 1 <<<"$query" | awk -F', ' '{print $2", "$3}')"
    [[ $driver =~ ^[0-9]+\. && $capability =~ ^[0-9]+\.[0-9]+$ ]] ||
        stop "nvidia-smi answers what this script cannot read: $(head -n 1 <<<"$query")"
    driver=${driver%%.*}
    capability=${capability/./}
elif command -v nvidia-smi >/dev/null; then
    stop "the driver is installed but does not answer ($(head -n 1 <<<"$query")): reboot; if that does not help, see \`dmesg | grep -i nvrm\` (Secure Boot refuses unsigned modules)"
elif has_gpu_on_bus; then
    echo "GPU: there is one from NVIDIA, without a driver"
else
    stop "no NVIDIA GPU found: Smelter also trains on the CPU, nothing needs to be set up"
fi

# --- what is missing -------------------------------------------------------------------------------------

if ((driver == 0 || driver < cuda12_driver)); then
    if [[ $system == ubuntu ]]; then
        actions+=("apt-get update" "apt-get install -y ubuntu-drivers-common" "ubuntu-drivers install")
    else
        actions+=("apt-get update" "apt-get install -y linux-headers-$(uname -r) nvidia-driver")
        notes+=("nvidia-driver is in Debian's component non-free: if apt does not find it, add \"contrib non-free non-free-firmware\" to your package sources")
    fi
    if ((driver)); then
        notes+=("driver $driver is too old for any build of PyTorch that Smelter runs on (CUDA 12 needs $cuda12_driver)")
    fi
    notes+=("reboot after the driver is installed, then run this script again")
else
    if ! command -v g++ >/dev/null; then
        actions+=("apt-get update" "apt-get install -y g++ python3-dev")
        notes+=("Triton and torch.compile build their launchers with a C++ compiler")
    fi
    torch=$(grep -E '^torch==' constraints.txt)
    if ((driver >= cuda13_driver && capability >= cuda13_capability)); then
        echo "PyTorch: the default build (CUDA 13) fits this driver and GPU"
        index=
    else
        echo "PyTorch: needs a CUDA 12 build (cu126): driver $driver, compute capability $capability; the default build wants driver $cuda13_driver and $cuda13_capability"
        index=${TORCH_INDEX_URL:-none}
    fi
    if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        echo "PyTorch: the one in .venv already uses the GPU"
    elif [[ $index == none ]]; then
        notes+=("for the CUDA 12 build: TORCH_INDEX_URL=ADDRESS scripts/setup_cuda.sh, with the address of the cu126 wheels from PyTorch's \"Get Started\" page; or update the driver to $cuda13_driver")
    else
        # Without the stamp first: if this is interrupted, the next `make` puts .venv right.
        actions+=(
            "scripts/setup_venv.sh && rm .venv/.set-up"
            ".venv/bin/python -m pip uninstall --yes --quiet torch"
            ".venv/bin/python -m pip install ${index:+--index-url $index }$torch"
            "scripts/setup_venv.sh"
            ".venv/bin/python -c 'import torch; assert torch.cuda.is_available(), torch.__version__'"
        )
        notes+=("if the last step fails, pip found a build without CUDA: look at \`pip config list\`")
    fi
fi

# --- say, ask, do ----------------------------------------------------------------------------------------

for note in "${notes[@]}"; do
    echo "Note: $note"
done
if ((${#actions[@]} == 0)); then
    echo "Nothing to install."
    exit 0
fi

commands=()
for action in "${actions[@]}"; do
    if [[ $action == apt-get* || $action == ubuntu-drivers* ]] && ((EUID != 0)); then
        action="sudo $action"
    fi
    commands+=("$action")
done
echo "To do:"
printf '  %s\n' "${commands[@]}"
if ((dry_run)); then
    echo "Dry run: nothing was changed."
    exit 0
fi
if ((!yes)); then
    read -r -p "Do this now? [y/N] " answer || answer=
    if [[ ${answer,,} != y && ${answer,,} != yes ]]; then
        echo "Nothing was changed."
        exit 1
    fi
fi
for command in "${commands[@]}"; do
    echo "+ $command"
    bash -c "$command"
done
