"""What a config asks of its data and devices: whether a batch can be, and how many steps."""

from __future__ import annotations

import math

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
    check_groups(config, devices)


def check_groups(config: PretrainConfig, devices: int) -> None:
    """Refuses groups of BatchNorm or micro-batches that the batch does not consist of."""
    size, group, parts = config.batch_size, config.model.bn_group, config.memory.accumulate
    if group and size % group:
        raise RunError(
            f"--model.bn-group {group}: does not divide --batch-size {size}; take "
            f"{math.gcd(group, size)} or another batch."
        )
    if parts == 1:
        return
    if size % (devices * parts):
        raise RunError(
            f"--memory.accumulate {parts}: --batch-size {size} on {devices} device(s) cannot be "
            f"cut into {parts} equal micro-batches; take "
            f"{max(1, size // (devices * parts)) * devices * parts} images, or another number."
        )
    micro = size // (devices * parts)
    if not group:
        raise RunError(
            f"--memory.accumulate {parts}: BatchNorm over the global batch needs the whole batch "
            f"at once; pass --model.bn-group {micro}, or a divisor of it."
        )
    if micro % group:
        raise RunError(
            f"--memory.accumulate {parts}: a micro-batch has {micro} images on each device, and "
            f"groups of --model.bn-group {group} do not fill it; pass --model.bn-group "
            f"{math.gcd(group, micro)}, or fewer micro-batches."
        )


def schedule_length(config: PretrainConfig, n_tiles: int) -> tuple[int, int]:
    """(steps of the whole run, steps of one pass over the data)."""
    steps_per_epoch = n_tiles // config.batch_size
    if config.steps is not None:
        return config.steps, steps_per_epoch
    epochs = 1000.0 if config.epochs is None else config.epochs
    return max(1, round(epochs * steps_per_epoch)), steps_per_epoch
