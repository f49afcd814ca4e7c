"""Peak speed of devices: model FLOPs per second divided by it is the model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re

import torch

PEAKS = {
    # NVIDIA, "NVIDIA <name>" as the driver gives it
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
    # before Ampere there is no bfloat16: float16
    "V100-PCIE": 112e12,
    "V100": 125e12,
    "T4": 65e12,
    # AMD, "AMD Instinct <name>"; a MI250X shows its two halves as devices of their own
    "MI325X": 1307.4e12,
    "MI300X": 1307.4e12,
    "MI250X": 191.5e12,
}
"""Peak bfloat16 operations a second of dense matrix products that add in float32, by a word of the device's name, the
closer name first. From the vendors' data sheets and architecture papers, whose larger figures are with sparsity."""

_OTHER_CHIPS = re.compile(r"\b(Laptop|Max-Q|MIG|4090 D|5090 D)\b", re.IGNORECASE)
"""What shares a name with a larger device, or is a slice of it."""


def peak_flops(device_name: str) -> float | None:
    """Peak of a device by its name, such as "NVIDIA A100-SXM4-80GB"; None where the table does not know it."""
    if _OTHER_CHIPS.search(device_name):
        return None
    for name, peak in PEAKS.items():
        if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE):
            return peak
    return None


def device_peak(device: torch.device) -> float | None:
    """Peak of the device that computes; None for a CPU and for what the table does not know."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
