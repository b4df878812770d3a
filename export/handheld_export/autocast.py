"""Computing in bfloat16 where the processor does so itself."""

from __future__ import annotations

import torch


def computes_bf16(device: torch.device) -> bool:
    """Tell whether bfloat16 is faster than float32 on a device.

    A CPU without AVX-512 or Arm's bfloat16 instructions emulates it, several times slower.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    """Return the context in which a device computes in bfloat16, or as before where it cannot."""
    device = torch.device(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device))
