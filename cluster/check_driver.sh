#!/bin/bash
# Refuse a machine with NVIDIA GPUs whose driver is missing or too old for the pinned torch, before
# minutes go into setting it up. Machines without GPUs pass.
set -euo pipefail

least=580 # for CUDA 13, which the torch of constraints.txt brings along

grep -qsi 0x10de /sys/bus/pci/devices/*/vendor || exit 0 # no device of NVIDIA
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | sort -V | head -n 1) || {
    echo "This machine has an NVIDIA GPU, but nvidia-smi fails: choose an image with a driver." >&2
    exit 1
}
[ "${driver%%.*}" -ge "$least" ] || {
    echo "NVIDIA driver $driver is too old: torch needs $least or newer. Choose a newer image." >&2
    exit 1
}
