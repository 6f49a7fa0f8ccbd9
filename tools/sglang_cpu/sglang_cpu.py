# SPDX-License-Identifier: MIT
"""A platform for SGLang whose device is the CPU, through SGLang's door for platforms.

SGLang's own CPU platform needs kernels that are published in source form only.  This one uses
torch's operators, so that the real engine runs where there is nothing but a CPU.
"""

from __future__ import annotations

import psutil
import torch
from sglang.srt.platforms.device_mixin import DeviceCapability, PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


def activate() -> str:
    """Return the platform's class, as SGLang asks for it."""
    return "sglang_cpu:CpuPlatform"


class CpuPlatform(SRTPlatform):
    """The host's processor and memory."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device(self, device_id: int = 0) -> torch.device:
        """Return the one device."""
        del device_id
        return torch.device("cpu")

    def set_device(self, device: torch.device) -> None:
        """There is one device only."""

    def get_device_name(self, device_id: int = 0) -> str:
        """Return the device's name."""
        del device_id
        return "cpu"

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability | None:
        """Say that there is none to compare."""
        del device_id
        return None

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Return the host's memory in bytes."""
        del device_id
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        """Return the bytes that this process holds."""
        del device
        return float(psutil.Process().memory_info().rss)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        """Return free and total bytes of the host."""
        del device_id
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)

    def get_default_attention_backend(self) -> str:
        """Use torch's attention."""
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        """Do not compile."""
        del mode
        return "eager"

    def get_dispatch_key_name(self) -> str:
        """Use the layers' plain torch form."""
        return "native"

    def get_torch_distributed_backend_str(self) -> str:
        """Use the backend of hosts."""
        return "gloo"
