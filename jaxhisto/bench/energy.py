"""Energy while something runs: of NVIDIA's GPUs by nvidia-smi, of a CPU by RAPL, or why not."""

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
        kind: Any = {"gpu": NvidiaSmi, "cpu": Rapl}.get(platform)
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
        visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
        which = visible[: self._devices] or [str(i) for i in range(self._devices)]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `stop`
        self._process = subprocess.Popen(
            [command, f"--id={','.join(which)}", "--query-gpu=power.draw",
             "--format=csv,noheader,nounits", f"--loop-ms={EVERY_MS}"],
            stdout=self._said, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def stop(self, seconds: float) -> Energy:
        """Ends it and takes the mean."""
        if self._process is None:
            return Energy(None, seconds, why="nvidia-smi is not on PATH")
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
