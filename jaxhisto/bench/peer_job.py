"""What a peer is told to measure; read on both sides of the pipe, so it imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

OUT_OF_MEMORY = "out of memory"
AUTOTUNED = "max-autotune-no-cudagraphs"
"""torch.compile's mode that tries kernels out. With CUDA graphs, its step would have to copy
gradients and weights out of their memory."""


@dataclass(frozen=True)
class PeerJob:
    """One stage of one peer, at one setting.

    Attributes:
      stage: augment, forward, backward, optimizer, step, read or pipeline.
      who: the peer, a key of `peers.PEERS`.
      model: a ResNet of torchvision.
      side: of a view, px.
      tile_px: side of a tile before its crop, px.
      batch: images; twice as many views.
      precision: f32 (TF32 off) or bf16 (autocast).
      threads: cores to use.
      images: of a turn of `read` and `pipeline`.
      calls: of a turn of the other stages, with one wait at their end.
      augment: `step` makes its views from uint8 tiles, as ours does; False: they are given.
      files: folder of JPEG tiles, for `read` and `pipeline`.
      store: tile store, for what reads that itself.
      platform: cpu or gpu; empty: a GPU where PyTorch sees one.
      projection, temperature, rate, momentum, weight_decay, trust: of the recipe; rate is the
        learning rate of this batch.
      jitter: brightness, contrast, saturation, hue; 80 % of the views have it.
    """

    stage: str
    who: str
    model: str = "resnet18"
    side: int = 224
    tile_px: int = 224
    batch: int = 32
    precision: str = "f32"
    threads: int = 1
    images: int = 0
    calls: int = 1
    augment: bool = True
    files: str = ""
    store: str = ""
    platform: str = ""
    projection: int = 128
    temperature: float = 0.1
    rate: float = 0.0375
    momentum: float = 0.9
    weight_decay: float = 1e-6
    trust: float = 0.001
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PeerJob:
        """What `to_json` made."""
        table = json.loads(text)
        return cls(**{**table, "jitter": tuple(table["jitter"])})

    @property
    def mode(self) -> str:
        """Of torch.compile, through which the network goes; empty: it does not."""
        return {"compiled": "default", "autotuned": AUTOTUNED}.get(self.who.partition("-")[2], "")


@dataclass
class Prepared:
    """A peer ready to run.

    Attributes:
      run: one turn; waits for the device. A number that it returns is the seconds that count,
        a pair those by the clock and those that cores worked.
      settings: how it was set up, and what was tried, for the record.
      close: ends workers.
    """

    run: Any
    settings: dict[str, Any] = field(default_factory=dict)
    close: Any = lambda: None
