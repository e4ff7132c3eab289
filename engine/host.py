"""CPU, memory and GPUs of the machine under the worker."""

from __future__ import annotations

import psutil
import pynvml

from protos.core.contract import Gpu, Host


class HostSampler:
    """Call `sample` about once a second: CPU load is the mean since the call before. Holds NVML open until `close`."""

    def __init__(self) -> None:
        self._gpus = _open_gpus()
        psutil.cpu_percent(interval=None)

    def sample(self) -> Host:
        memory = psutil.virtual_memory()
        return Host(
            cpu_percent=psutil.cpu_percent(interval=None),
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            gpus=tuple(gpu for index, handle in enumerate(self._gpus) if (gpu := _sample_gpu(index, handle))),
        )

    def close(self) -> None:
        if self._gpus:
            self._gpus = []
            pynvml.nvmlShutdown()


def _open_gpus() -> list[object]:
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _sample_gpu(index: int, handle: object) -> Gpu | None:
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        utilization = pynvml.nvmlDeviceGetUtilizationRates(handle)
    except pynvml.NVMLError:
        return None
    return Gpu(
        index=index,
        utilization_percent=float(utilization.gpu),
        memory_used_bytes=int(memory.used),
        memory_total_bytes=int(memory.total),
    )
