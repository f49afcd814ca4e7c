"""Peak FLOPs per second of devices, the denominator of the model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re

import torch

PEAKS = {
    # NVIDIA; the driver reports "NVIDIA <name>"
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835.5e12,
    "H200": 989e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    # no bfloat16 before Ampere: float16 peaks
    "V100-PCIE": 112e12,
    "V100": 125e12,
    "T4": 65e12,
    # AMD, "AMD Instinct <name>"; each MI250X appears as two devices, so its entry is per half
    "MI325X": 1307.4e12,
    "MI300X": 1307.4e12,
    "MI250X": 191.5e12,
}
"""Peak bfloat16 FLOPs per second of dense matrix products with float32 accumulation, keyed by part of the device name,
more specific names first. From the vendors' data sheets and architecture papers (figures without sparsity)."""

_OTHER_CHIPS = re.compile(r"\b(Laptop|Max-Q|MIG|4090 D|5090 D)\b", re.IGNORECASE)
"""Markers of devices that share a name with a faster device, or are a slice of it."""


def peak_flops(device_name: str) -> float | None:
    """Peak FLOPs per second of a device by name, e.g. "NVIDIA A100-SXM4-80GB"; None if not in the table."""
    if _OTHER_CHIPS.search(device_name):
        return None
    for name, peak in PEAKS.items():
        if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE):
            return peak
    return None


def device_peak(device: torch.device) -> float | None:
    """Peak FLOPs per second of a device; None for a CPU or a GPU not in the table."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
