"""Energy of the GPUs, by their own counters."""

from typing import Any

import torch


class EnergyMeter:
    """Joules that one GPU has used, from the counter that NVIDIA's management library reads (Volta and later).

    Needs ``pip install "simclr_scale[gpu]"``. Without it, without such a GPU, or where the driver refuses, ``joules``
    gives None: energy is a figure beside others, and no run ends for want of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        if device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            # By its identity, not its number: CUDA_VISIBLE_DEVICES renumbers them for torch alone.
            identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(identity)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except pynvml.NVMLError:
            return
        self._nvml = pynvml

    def joules(self) -> float | None:
        """Since the driver was loaded; None where there is no counter."""
        if self._nvml is None:
            return None
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        except self._nvml.NVMLError:
            self._nvml = None
            return None
