"""The GPUs of this machine: their use, memory and temperature, by NVIDIA's management library."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .terminal import size


@dataclass(frozen=True)
class Gpu:
    """A GPU, with None for what it does not tell.

    Args:
        name: its model.
        use: the share of the last moments in which a kernel ran, in percent.
        used: the bytes of its memory that are taken.
        total: the bytes of its memory.
        temperature: in degrees Celsius.
    """

    name: str
    use: int | None
    used: int | None
    total: int | None
    temperature: int | None

    def line(self) -> str:
        """Returns all of it in one line."""
        use = "" if self.use is None else f"  {self.use:3} % in use"
        memory = "" if self.used is None or self.total is None else f"  {size(self.used)} of {size(self.total)}"
        return f"{self.name}{use}{memory}{'' if self.temperature is None else f'  {self.temperature} °C'}"


def read_gpus() -> list[Gpu]:
    """Returns the GPUs of this machine; none where there is no driver."""
    import pynvml  # type: ignore[import-untyped]

    def ask(what: Callable[..., Any], *arguments: Any) -> Any:
        with suppress(pynvml.NVMLError):  # such as a part of a GPU, which has no use of its own
            return what(*arguments)

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            use, memory = ask(pynvml.nvmlDeviceGetUtilizationRates, gpu), ask(pynvml.nvmlDeviceGetMemoryInfo, gpu)
            temperature = ask(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU)
            name = ask(pynvml.nvmlDeviceGetName, gpu) or f"GPU {index}"
            found.append(Gpu(name, use and use.gpu, memory and memory.used, memory and memory.total, temperature))
        return found
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()
