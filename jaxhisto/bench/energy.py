"""Energy while something runs: of NVIDIA's GPUs by NVML or nvidia-smi, of a CPU by RAPL."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
EVERY_MS = 200
GRACE_S = 10.0
AMD = Path("/dev/kfd")  # the device of AMD's driver for compute


@dataclass(frozen=True)
class Energy:
    """Of `seconds` of work.

    Attributes:
      joules: None where it cannot be read, and `why` says so.
      source: what was read and what it covers.
    """

    joules: float | None
    seconds: float
    source: str = ""
    why: str = ""


class Meter:
    """Reads the energy between `start` and `stop`."""

    def __init__(self, platform: str, devices: int = 1) -> None:
        """`platform` is JAX's: cpu, gpu or tpu; `devices` are those that work."""
        kind: Any = {"gpu": nvidia, "cpu": Rapl}.get(platform)
        self._reader = kind(devices) if kind else None
        self._platform, self._began = platform, 0.0

    def start(self) -> None:
        """Begins."""
        if self._reader is not None:
            self._reader.start()
        self._began = time.perf_counter()

    def stop(self) -> Energy:
        """What it took since `start`."""
        seconds = time.perf_counter() - self._began
        if self._reader is None:
            return Energy(None, seconds, why=f"no meter for {self._platform} devices")
        found: Energy = self._reader.stop(seconds)
        return found


class Rapl:
    """The counters of the CPU's packages in microjoules, which wrap around."""

    def __init__(self, devices: int) -> None:
        # Packages alone: their cores and memory have zones of their own within, `intel-rapl:0:0`.
        zones = sorted(POWERCAP.glob("intel-rapl:*"))
        self._zones = [zone for zone in zones if zone.name.count(":") == 1]
        self._before: list[int] = []
        self._why = ""

    def start(self) -> None:
        """Reads the counters."""
        if not self._zones:
            self._why = f"no RAPL counters in {POWERCAP} (a virtual machine, or no Linux)"
            return
        try:
            self._before = [number(zone / "energy_uj") for zone in self._zones]
        except OSError as error:
            self._why = (
                f"{self._zones[0] / 'energy_uj'} cannot be read ({error.strerror}); as root: "
                "chmod a+r it"
            )

    def stop(self, seconds: float) -> Energy:
        """Reads them again."""
        if self._why:
            return Energy(None, seconds, why=self._why)
        micro = 0
        for zone, before in zip(self._zones, self._before, strict=True):
            after = number(zone / "energy_uj")
            wrapped = number(zone / "max_energy_range_uj") if after < before else 0
            micro += after - before + wrapped
        source = f"RAPL, {len(self._zones)} CPU package(s) with all that ran on them"
        return Energy(micro / 1e6, seconds, source)


def number(file: Path) -> int:
    """A file's one number."""
    return int(file.read_text())


def visible(devices: int) -> list[str]:
    """Indices or UUIDs of the first GPUs that CUDA shows, in its order."""
    named = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return [v for v in named if v][:devices] or [str(i) for i in range(devices)]


def nvidia(devices: int) -> Any:
    """What reads NVIDIA's GPUs: the counter of their energy where pynvml is installed and they have
    one (since Volta), else samples of their power."""
    try:
        return Nvml(devices)
    except Exception:  # pynvml's errors are made at run time, and each says: not by this way
        return NvidiaSmi(devices)


class Nvml:
    """The counters of the first GPUs that are visible, in millijoules since the driver was loaded.

    (nvmlDeviceGetTotalEnergyConsumption.) An index is NVML's, by the place on the PCI bus; CUDA's
    own is that too where all GPUs are of one kind.
    """

    def __init__(self, devices: int) -> None:
        """Opens them.

        Raises:
          ImportError, pynvml.NVMLError, LookupError: there is no pynvml, driver, counter or GPU.
        """
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        self._handles = [self._handle(name) for name in visible(devices)]
        self._before = self._counted()

    def _handle(self, name: str) -> Any:
        """Of an index, or of a UUID, which may be cut short."""
        if name.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
        for i in range(self._nvml.nvmlDeviceGetCount()):
            handle = self._nvml.nvmlDeviceGetHandleByIndex(i)
            uuid = self._nvml.nvmlDeviceGetUUID(handle)
            if (uuid.decode() if isinstance(uuid, bytes) else uuid).startswith(name):
                return handle
        raise LookupError(f"no GPU {name}")

    def _counted(self) -> int:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in self._handles)

    def start(self) -> None:
        """Reads the counters."""
        self._before = self._counted()

    def stop(self, seconds: float) -> Energy:
        """Reads them again."""
        source = f"NVML, the counters of {len(self._handles)} GPU(s) alone, not of the host"
        return Energy((self._counted() - self._before) / 1e3, seconds, source)


class NvidiaSmi:
    """The mean of what nvidia-smi says of the power of the first GPUs that are visible."""

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self._process: subprocess.Popen[str] | None = None
        self._said: Any = None

    def start(self) -> None:
        """Starts sampling."""
        command = shutil.which("nvidia-smi")
        if command is None:
            return
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `stop`
        self._process = subprocess.Popen(
            [command, f"--id={','.join(visible(self._devices))}", "--query-gpu=power.draw",
             "--format=csv,noheader,nounits", f"--loop-ms={EVERY_MS}"],
            stdout=self._said, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def stop(self, seconds: float) -> Energy:
        """Ends it and takes the mean."""
        if self._process is None:
            why = "nvidia-smi is not on PATH"
            if AMD.exists():
                why = "this reads NVIDIA's GPUs and CPUs; an AMD GPU's energy is not measured"
            return Energy(None, seconds, why=why)
        self._process.terminate()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.seek(0)
        lines = self._said.read().splitlines()
        self._said.close()
        watts = [watt for line in lines if (watt := as_float(line)) is not None]
        if not watts:
            said = next((line for line in lines if line.strip()), "nothing")
            return Energy(None, seconds, why=f"nvidia-smi gives no power: it says {said[:100]!r}")
        mean = sum(watts) / len(watts)
        source = (
            f"nvidia-smi, {len(watts)} samples of {mean:.0f} W a GPU on the mean; the GPUs alone, "
            "not the host"
        )
        return Energy(mean * self._devices * seconds, seconds, source)


def as_float(text: str) -> float | None:
    """A number, or None of what is none."""
    try:
        return float(text)
    except ValueError:
        return None
