"""What a config asks of its data and devices: whether a batch can be, and how many steps."""

from __future__ import annotations

from jaxhisto.config import PretrainConfig
from jaxhisto.errors import RunError


def check_batch(config: PretrainConfig, n_tiles: int, devices: int) -> None:
    """Refuses a batch that the devices cannot share or the data cannot fill."""
    if config.batch_size % devices:
        raise RunError(
            f"--batch-size {config.batch_size}: not divisible by {devices} devices; take "
            f"{max(1, config.batch_size // devices) * devices} or set --devices."
        )
    if config.batch_size > n_tiles:
        raise RunError(
            f"--batch-size {config.batch_size}: larger than the data, {n_tiles} tiles; take at "
            f"most {n_tiles // devices * devices} or add stores."
        )


def schedule_length(config: PretrainConfig, n_tiles: int) -> tuple[int, int]:
    """(steps of the whole run, steps of one pass over the data)."""
    steps_per_epoch = n_tiles // config.batch_size
    if config.steps is not None:
        return config.steps, steps_per_epoch
    epochs = 1000.0 if config.epochs is None else config.epochs
    return max(1, round(epochs * steps_per_epoch)), steps_per_epoch
