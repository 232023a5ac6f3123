"""The draw: which tiles of which datasets a run shall see (paper: sec. 5.4 to 5.6).

A tile's place in the draw is a keyed hash of (seed, dataset, slide id, um/px, row in the slide's
part), an image's of (seed, dataset, name): never where a store lies or what else is given. Of each
slide the first `per_slide` by that hash stay in, of what stays of a dataset the first n. So:

- datasets added or left out change nothing in the others, but under `--total`, which shares;
- a greater n (percent, per_dataset, total) keeps all that a smaller one takes, as long as
  `per_slide` is the same;
- slides added to a dataset change n, and put their tiles between the others in the order of the
  hash: of the tiles there before, those taken are still the first by the hash.

No jax in here.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from jaxhisto.data import catalog
from jaxhisto.data.candidates import Slide, chosen, open_pool
from jaxhisto.data.catalog import About
from jaxhisto.data.manifest import Entry, Manifest
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.file_config import SampleConfig

NOT_RULE = {"sources", "out", "datasets", "seed", "failures_allowed", "threads"}
"""Settings that the manifest's `rule` leaves out: places, and what stands elsewhere in it."""


@dataclass(frozen=True, slots=True)
class Quota:
    """How many tiles of a dataset: `asked` by the rule, `taken` in the end, and `why` so many."""

    asked: int
    taken: int
    why: str


@dataclass(frozen=True)
class Sample:
    """A manifest, where its tiles lie, and what the person who drew it should see."""

    manifest: Manifest
    paths: Sequence[str]
    left_out: Sequence[str]
    doubts: Sequence[str] = ()

    def summary(self) -> list[str]:
        """The counts of each dataset as a table, what was left out, the total last."""
        head = ("dataset", "organ", "there", "asked", "taken", "why")
        rows = [
            (
                d["name"],
                d["organ"],
                *(f"{d[k]:,}" for k in ("available", "asked", "taken")),
                d["why"],
            )
            for d in self.manifest.datasets
        ]
        return [
            *catalog.table_lines([head, *rows], right={2, 3, 4}),
            *(f"left out: {line}" for line in self.left_out),
            *(f"note: {line}" for line in self.doubts),
            f"{len(self.manifest):,} tiles of {len(rows)} datasets, manifest "
            f"{self.manifest.hash[:12]}",
        ]


def sample(config: SampleConfig) -> Sample:
    """Draws a list by the rule of the config, from sources that are checked whole.

    Raises:
      ConfigError: not exactly one of percent, per_dataset and total; a minimum above the maximum;
        an organ, stain or dataset that is not known, with a suggestion.
      StoreError: a source that cannot be used, a slide in two of them, a dataset of which the
        organ is asked and not known, or nothing left to draw from.
    """
    check_rule(config)
    known = catalog.known_datasets(config.datasets)
    pool = open_pool(config, known)
    about = {name: known.get(catalog.name_key(name), ("", About()))[1] for name in pool.datasets()}
    slides, left_out = chosen(config, pool.slides, about, known)
    by_dataset: dict[str, list[Slide]] = defaultdict(list)
    for slide in slides:
        by_dataset[slide.dataset].append(slide)
    there = {name: available(of, config.per_slide) for name, of in sorted(by_dataset.items())}
    quotas = quotas_of(config, there)
    entries = [
        entry
        for name, quota in quotas.items()
        for entry in draw(by_dataset[name], quota.taken, config.seed, config.per_slide)
    ]
    if not entries:
        raise StoreError(
            f"{config.out}: the rule takes no tile of {sum(there.values()):,}; raise --percent or "
            "--minimum."
        )
    drawn_of = {(slide.source, slide.dataset) for slide in slides}
    used = sorted({source for source, _ in drawn_of})
    manifest = Manifest(
        rule={k: v for k, v in vars(config).items() if k not in NOT_RULE},
        seed=config.seed,
        sources=sorted(
            (
                {key: value for key, value in record.items() if key != "source"}
                for record in pool.sources
                if (record["source"], record["dataset"]) in drawn_of
            ),
            key=lambda s: (s["dataset"], s["kind"], s["hash"]),
        ),
        datasets=[
            {"name": name, "organ": about[name].organ, "stain": about[name].stain}
            | {"available": there[name], **_fields(quota)}
            for name, quota in quotas.items()
        ],
        entries=entries,
    )
    left_out += [f"{name}: {why}" for name, why in pool.dropped]
    doubts = catalog.doubts(pool.datasets(), config.datasets)
    return Sample(manifest, [pool.paths[i] for i in used], left_out, doubts)


def check_rule(config: SampleConfig) -> None:
    """Refuses settings that contradict each other (ConfigError)."""
    ways = {"--percent": config.percent, "--per-dataset": config.per_dataset}
    given = [flag for flag, value in {**ways, "--total": config.total}.items() if value is not None]
    if len(given) != 1:
        fact = f"{' and '.join(given)} are given" if given else "no size is given"
        raise ConfigError(f"{fact}; pass one of --percent, --per-dataset and --total.")
    if config.per_dataset is None and 0 < config.maximum < config.minimum:
        raise ConfigError(
            f"--minimum {config.minimum} is above --maximum {config.maximum}; lower it, or pass "
            "--maximum 0 for no limit."
        )


def quotas_of(config: SampleConfig, there: Mapping[str, int]) -> dict[str, Quota]:
    """How many tiles of each dataset, for the tiles that it has after `per_slide`.

    Percent are rounded to the nearest tile, halves up, then raised to the minimum, lowered to
    the maximum, and to what there is.

    Raises:
      ConfigError: a total that the minima exceed, or that cannot be reached.
    """
    if config.per_dataset is not None:
        return {name: _held(config.per_dataset, n) for name, n in there.items()}
    if config.total is not None:
        return _shared(config, config.total, there)
    return {name: _bounded(config, n) for name, n in there.items()}


def available(slides: Iterable[Slide], per_slide: int) -> int:
    """Tiles of these slides of one dataset, at most `per_slide` of each over its resolutions."""
    counts: dict[str, int] = defaultdict(int)
    for slide in slides:
        counts[slide.slide] += slide.tiles
    return sum(min(n, per_slide) if per_slide else n for n in counts.values())


def draw(slides: Sequence[Slide], n: int, seed: int, per_slide: int) -> list[Entry]:
    """The first n tiles of one dataset by their hash, sorted by slide, um/px and row."""
    by_id: dict[str, list[int]] = defaultdict(list)
    for i, slide in enumerate(slides):
        by_id[slide.slide].append(i)
    kept: list[tuple[bytes, int, int]] = []
    for indices in by_id.values():
        ranked = (mark for i in indices for mark in _marks(slides[i], i, seed))
        kept += heapq.nsmallest(per_slide, ranked) if per_slide else ranked
    rows: dict[int, list[int]] = defaultdict(list)
    for _, i, row in heapq.nsmallest(n, kept):
        rows[i].append(row)
    entries = [
        Entry(s.dataset, s.slide, s.mpp, s.sha256, None if s.count is None else tuple(sorted(of)))
        for i, of in rows.items()
        for s in (slides[i],)
    ]
    return sorted(entries, key=lambda e: (e.slide, e.mpp or 0.0))


def rank(seed: int, dataset: str, slide: str, mpp: float | None, row: int | None) -> bytes:
    """(16,) bytes that place a tile in the draw, smallest first.

    BLAKE2b over these values with zero bytes between, um/px to 6 digits; of an image, um/px and
    row are empty, so that a resolution stated later changes nothing.
    """
    tile = ("", "") if row is None else (f"{mpp or 0:.6g}", str(row))
    text = "\0".join(("jaxhisto-draw-1", str(seed), dataset, slide, *tile))
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()


def _bounded(config: SampleConfig, there: int) -> Quota:
    # As it was typed: 0.1 has no exact float, and 0.1 % of 5,000 is 5.
    exact = Fraction(str(config.percent)) / 100 * there
    asked, why = int(exact + Fraction(1, 2)), f"{config.percent:g} %"
    n = asked
    if n < config.minimum:
        n, why = config.minimum, "minimum"
    if config.maximum and n > config.maximum:
        n, why = config.maximum, "maximum"
    held = _held(n, there)
    return Quota(asked, held.taken, why if held.taken == n else held.why)


def _held(asked: int, there: int) -> Quota:
    return Quota(asked, min(asked, there), "all there are" if there < asked else "as asked")


def _shared(config: SampleConfig, total: int, there: Mapping[str, int]) -> dict[str, Quota]:
    """Hands out a total: each its minimum, then a tile at a time where the share is smallest."""
    taken = {name: min(config.minimum, n) for name, n in there.items()}
    most = {name: min(config.maximum, n) if config.maximum else n for name, n in there.items()}
    if sum(taken.values()) > total:
        raise ConfigError(
            f"--total {total:,}: the minimum alone takes {sum(taken.values()):,} of {len(there)} "
            "datasets; lower --minimum or raise --total."
        )
    if sum(most.values()) < total:
        raise ConfigError(
            f"--total {total:,}: only {sum(most.values()):,} can be taken of {len(there)} datasets "
            f"at --maximum {config.maximum}; lower --total, raise --maximum, or give more data."
        )
    # A division is rounded alike on every machine, and equal shares fall back on the name.
    queue = [((taken[name] + 1) / n, name) for name, n in there.items() if taken[name] < most[name]]
    heapq.heapify(queue)
    for _ in range(total - sum(taken.values())):
        _, name = heapq.heappop(queue)
        taken[name] += 1
        if taken[name] < most[name]:
            heapq.heappush(queue, ((taken[name] + 1) / there[name], name))
    return {name: Quota(n, n, _why_share(config, n, there[name])) for name, n in taken.items()}


def _why_share(config: SampleConfig, taken: int, there: int) -> str:
    if taken == there:
        return "all there are"
    if taken == config.maximum:
        return "maximum"
    return "minimum" if taken == config.minimum else f"{taken / there:.3g} of it"


def _marks(slide: Slide, index: int, seed: int) -> Iterable[tuple[bytes, int, int]]:
    if slide.count is None:
        return [(rank(seed, slide.dataset, slide.slide, None, None), index, 0)]
    return (
        (rank(seed, slide.dataset, slide.slide, slide.mpp, row), index, row)
        for row in range(slide.count)
    )


def _fields(quota: Quota) -> dict[str, Any]:
    return {"asked": quota.asked, "taken": quota.taken, "why": quota.why}
