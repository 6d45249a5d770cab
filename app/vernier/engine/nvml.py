"""What the GPUs are doing, read from NVML at each scrape: utilization, memory, power, energy, temperature.

Of a GPU split into MIG instances each instance is listed with its own memory; NVML tells utilization
and power for the whole GPU alone. Triton's names stand beside ours.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vernier.errors import EngineError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuReading:
    """One GPU or MIG instance; None for what this GPU does not tell.

    Attributes:
        utilization: share of the last sample period during which a kernel ran, 0 to 1.
        energy_joules: since the driver was loaded.
        mig: number of the MIG instance; empty for a whole GPU.
    """

    index: int
    uuid: str
    name: str
    mig: str
    utilization: Optional[float]
    memory_used_bytes: Optional[int]
    memory_total_bytes: Optional[int]
    power_watts: Optional[float]
    power_limit_watts: Optional[float]
    energy_joules: Optional[float]
    temperature_celsius: Optional[float]


class Nvml:
    """NVML, opened once. Raises EngineError where there is no NVIDIA driver.

    Args:
        pci_bus_ids: the GPUs to list, as `Device.pci_bus_id` gives them; None for all.
    """

    def __init__(self, pci_bus_ids: Optional[Sequence[str]] = None) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise EngineError(f"GPU metrics need the package nvidia-ml-py ({error})") from error
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [
                (index, pynvml.nvmlDeviceGetHandleByIndex(index))
                for index in range(pynvml.nvmlDeviceGetCount())
            ]
        except pynvml.NVMLError as error:
            raise EngineError(f"NVML is not usable here: {error}") from error
        if pci_bus_ids is not None:
            wanted = {_bus_key(bus) for bus in pci_bus_ids}
            self._handles = [(i, h) for i, h in self._handles if _bus_key(self._bus(h)) in wanted]

    def _bus(self, handle: Any) -> str:
        return _text(self._nvml.nvmlDeviceGetPciInfo(handle).busId)

    def read(self) -> List[GpuReading]:
        """One reading for each GPU, and one for each MIG instance."""
        readings: List[GpuReading] = []
        for index, handle in self._handles:
            readings.append(self._read_one(index, handle, ""))
            readings.extend(self._read_one(index, part, str(i)) for i, part in self._instances(handle))
        return readings

    def _instances(self, handle: Any) -> Iterator[Tuple[int, Any]]:
        nvml = self._nvml
        mode = self._ask(nvml.nvmlDeviceGetMigMode, handle)
        if not mode or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return
        for number in range(self._ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            part = self._ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
            if part is not None:
                yield number, part

    def _read_one(self, index: int, handle: Any, mig: str) -> GpuReading:
        nvml, ask = self._nvml, self._ask
        memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = None if mig else ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power = None if mig else ask(nvml.nvmlDeviceGetPowerUsage, handle)
        limit = None if mig else ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        energy = None if mig else ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        heat = None if mig else ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        return GpuReading(
            index=index,
            uuid=_text(ask(nvml.nvmlDeviceGetUUID, handle) or ""),
            name=_text(ask(nvml.nvmlDeviceGetName, handle) or ""),
            mig=mig,
            utilization=None if rates is None else rates.gpu / 100,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_watts=None if power is None else power / 1e3,
            power_limit_watts=None if limit is None else limit / 1e3,
            energy_joules=None if energy is None else energy / 1e3,
            temperature_celsius=None if heat is None else float(heat),
        )

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """None for what this GPU or driver does not tell."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None

    def close(self) -> None:
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError as error:
            logger.debug("NVML did not shut down: %s", error)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _bus_key(bus: str) -> Tuple[int, ...]:
    """`0000:3B:00.0` and `00000000:3b:00.0` are the same place."""
    domain, device, rest = bus.split(":")
    slot, _, function = rest.partition(".")
    return int(domain, 16), int(device, 16), int(slot, 16), int(function or "0", 16)


#: attribute of GpuReading → (our name, Triton's name or "", text, counter?)
_FAMILIES: Tuple[Tuple[str, str, str, str, bool], ...] = (
    ("utilization", "vernier_gpu_utilization_ratio", "nv_gpu_utilization", "Share of time with a kernel", False),
    ("memory_used_bytes", "vernier_gpu_memory_used_bytes", "nv_gpu_memory_used_bytes", "GPU memory in use", False),
    ("memory_total_bytes", "vernier_gpu_memory_total_bytes", "nv_gpu_memory_total_bytes", "GPU memory", False),
    ("power_watts", "vernier_gpu_power_watts", "nv_gpu_power_usage", "Power drawn", False),
    ("power_limit_watts", "vernier_gpu_power_limit_watts", "nv_gpu_power_limit", "Enforced power limit", False),
    ("energy_joules", "vernier_gpu_energy_joules", "nv_energy_consumption", "Energy since the driver was loaded", True),
    ("temperature_celsius", "vernier_gpu_temperature_celsius", "", "GPU temperature", False),
)  # fmt: skip


class GpuCollector(Collector):
    """Prometheus families of every reading; reads NVML once for each scrape."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml

    def collect(self) -> Iterator[Metric]:
        readings = self._nvml.read()
        for attribute, own, triton, text, counter in _FAMILIES:
            make = CounterMetricFamily if counter else GaugeMetricFamily
            family = make(own, text, labels=["gpu", "uuid", "name", "mig"])
            twin = make(triton, text, labels=["gpu_uuid"]) if triton else None
            for reading in readings:
                value = getattr(reading, attribute)
                if value is None:
                    continue
                family.add_metric([str(reading.index), reading.uuid, reading.name, reading.mig], value)
                if twin is not None:
                    twin.add_metric([reading.uuid], value)
            yield family
            if twin is not None:
                yield twin
