"""Find a ResNet among the names of a file, whatever it is wrapped in, or say what else it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxhisto_export.architecture import (
    ARCHITECTURES,
    COUNT_SUFFIX,
    Architecture,
    Shapes,
    closest,
)
from jaxhisto_export.lazy_tensors import LazyTensor
from jaxhisto_export.pickle_machine import Stub, shown

Tensors = dict[str, LazyTensor]

KNOWN_PREFIXES = (
    *("module.", "encoder_q.", "backbone.", "encoder.", "trunk._feature_blocks.", "trunk."),
    *("_feature_blocks.", "model.", "resnet.", "net.", "network.", "base_encoder."),
    *("online_encoder.", "teacher.", "student.", "feature_extractor.", "base_model."),
    *("state_dict.", "model_state_dict.", "classy_state_dict."),
)
"""What training code wraps a ResNet in; they nest. Others are taken too, where no known one is."""

PREFERENCE: tuple[tuple[str, int], ...] = (
    (r"student(_.*)?", 1),  # of DINO, whose teacher is the better one
    (r"encoder_k|key_encoder|target(_.*)?|.*momentum.*|.*_ema|ema(_.*)?|.*_k", 2),
)
"""Full matches of a part of a name: of several ResNets in a file the lowest number wins."""

NUMBERED = {"0": "conv1", "1": "bn1", **{str(n): f"layer{n - 3}" for n in range(4, 8)}}
"""Children of torchvision's ResNet by position, as in nn.Sequential(*resnet.children())."""

TRANSFORMER = "a transformer, as CTransPath, Phikon and UNI are"
SIGNS: tuple[tuple[str, str], ...] = (
    (r"cls_token|patch_embed\.|pos_embed|blocks\.\d+\.attn\.|encoder\.layer\.\d+\.", TRANSFORMER),
    (
        r"(^|\.)(root|stem)\.conv\.weight|block1\.unit01\.|stages\.0\.blocks\.0\.norm1",
        "a ResNet v2 with GroupNorm, as REMEDIS",
    ),
    (r"(^|\.)conv1\.0\.weight", "a ResNet with a deep stem, as timm's resnet50d"),
    (r"denseblock\d", "a DenseNet"),
    (r"_conv_stem|conv_stem|conv_dw|dwconv", "an EfficientNet, MobileNet or ConvNeXt"),
    (r"\.se\.|\.se_module\.", "a network with squeeze-and-excitation"),
    (r"Conv2d_1a_3x3|Mixed_\d", "an Inception network"),
    (r"features\.\d+\.weight", "a VGG or AlexNet"),
)
"""What names say about a file that is no ResNet of ours; the first that is found in one."""

NO_MODELS = ("optim", "callbacks")  # keys of dicts whose tensors nobody looks for

MAX_TENSORS = 20_000  # a ResNet101 has 624
MAX_DEPTH = 6  # of dicts in dicts; VISSL nests five
MAX_TABLES = 200
MAX_PLACES = 16
LISTED = 3  # names in a message

_BACKBONE = re.compile(r"(conv1|bn1|layer\d+|downsample)\.")
_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.")
_IN_BLOCK = re.compile(r"layer\d+\.\d+\.$")


@dataclass(frozen=True)
class Table:
    """A dict with tensors in it.

    Attributes:
      where: keys that lead to it.
      tensors: under its own names.
    """

    where: tuple[str, ...]
    tensors: Tensors


@dataclass(frozen=True)
class Place:
    """A ResNet, or something like one, in a table.

    Attributes:
      prefix: what its names begin with.
      numbered: whether children go by position.
      names: torchvision's name -> the table's name; with the head and what else is there.
    """

    table: Table
    prefix: str
    numbered: bool
    names: dict[str, str]

    @cached_property
    def tensors(self) -> Tensors:
        """Under torchvision's names."""
        return {name: self.table.tensors[own] for name, own in self.names.items()}

    @cached_property
    def architecture(self) -> Architecture:
        """That with most names in common."""
        return closest(n for n in self.names if _BACKBONE.match(n))

    @property
    def path(self) -> str:
        """Keys and prefix, dotted."""
        return ".".join((*self.table.where, self.prefix))

    def matched(self) -> int:
        """Tensors with a name and shape of the architecture, counters aside."""
        tensors = self.tensors
        return sum(
            name in tensors and tensors[name].shape == shape
            for name, shape in _needed(self.architecture).items()
        )

    def rank(self) -> tuple[int, int]:
        """Lower is better: how little it is the one to take, and unknown wrappings."""
        parts = self.path.split(".")
        worst = max(
            (n for p in parts for rule, n in PREFERENCE if re.fullmatch(rule, p)), default=0
        )
        known = {part for prefix in KNOWN_PREFIXES for part in prefix.split(".")}
        return worst, sum(part not in known for part in parts)


def tables(content: Any) -> list[Table]:
    """Every dict with tensors that text keys lead to, but `NO_MODELS`."""
    found: list[Table] = []
    seen: set[int] = set()
    queue: list[tuple[tuple[str, ...], Any]] = [((), content)]
    for where, value in queue:  # grows while it is walked
        items = value.items if isinstance(value, Stub) else value
        if not isinstance(items, Mapping) or id(items) in seen or len(seen) >= MAX_TABLES:
            continue
        seen.add(id(items))
        named = {k: v for k, v in items.items() if isinstance(k, str)}
        tensors = {k: v for k, v in named.items() if isinstance(v, LazyTensor)}
        if len(tensors) > MAX_TENSORS:
            raise ValueError(f"{len(tensors)} tensors, of which a ResNet101 has 624")
        if tensors:
            found.append(Table(where, tensors))
        if len(where) < MAX_DEPTH:
            deeper = (k for k in named if not k.startswith(NO_MODELS))
            queue += [((*where, k), named[k]) for k in deeper if isinstance(named[k], (dict, Stub))]
    return found


def places(table: Table) -> list[Place]:
    """Every prefix under which a ResNet seems to begin."""
    prefixes: dict[tuple[str, bool], None] = {}
    for name in table.tensors:
        for ending, numbered in (("4.0.conv1.weight", True), ("conv1.weight", False)):
            prefix = name.removesuffix(ending)
            if prefix == name or (prefix and not prefix.endswith(".")) or _IN_BLOCK.search(prefix):
                continue
            if numbered or not re.search(r"(^|\.)\d+\.\d+\.$", prefix):
                prefixes[prefix, numbered] = None
    listed = list(prefixes)[:MAX_PLACES]
    return [Place(table, p, n, dict(_renamed(table.tensors, p, n))) for p, n in listed]


def _renamed(tensors: Tensors, prefix: str, numbered: bool) -> Iterator[tuple[str, str]]:
    for own in tensors:
        name = own.removeprefix(prefix)
        if not own.startswith(prefix):
            continue
        if numbered:
            child, _, rest = name.partition(".")
            name = f"{NUMBERED[child]}.{rest}" if child in NUMBERED else f"child {name}"
        yield name, own


def choose(found: list[Table]) -> Place:
    """The ResNet of a file.

    Raises:
      ValueError: there is none, or several that are equally good; a clause that begins with
        what the file `is` or `holds`.
    """
    ranked = sorted(
        ((-place.matched(), place.rank(), place) for table in found for place in places(table)),
        key=lambda entry: entry[:2],
    )
    if not ranked or -ranked[0][0] < len(_needed(ranked[0][2].architecture)) // 2:
        _refuse_by_signs(found)
    if not ranked:
        some = [name for table in found for name in table.tensors][:LISTED]
        raise ValueError(f"holds no ResNet with torchvision's names, but {listed(some)}")
    if len(ranked) > 1 and ranked[0][:2] == ranked[1][:2]:
        both = [f"`{shown(entry[2].path)}`" for entry in ranked[:2]]
        raise ValueError(f"holds several ResNets, under {' and '.join(both)}")
    return ranked[0][2]


def _refuse_by_signs(found: list[Table]) -> None:
    names = [name for table in found for name in table.tensors]
    for rule, what in SIGNS:
        if any(re.search(rule, name[:200]) for name in names):
            raise ValueError(f"is {what}, not a ResNet v1")


def check(place: Place) -> None:
    """Whether every tensor of the architecture is there, of the right shape, and no other.

    Raises:
      ValueError: it is not; a clause that begins with what the file `is`, `has` or `lacks`.
    """
    tensors, needed = place.tensors, place.architecture.backbone()
    _check_norms(tensors)
    _check_depth(tensors)
    shape = tensors["conv1.weight"].shape if "conv1.weight" in tensors else (64, 3, 7, 7)
    if len(shape) == 4 and shape[1] != 3:
        raise ValueError(f"has a conv1 of {shape[1]} input channels, not 3")
    missing = [n for n in _needed(place.architecture) if n not in tensors]
    extra = [n for n in tensors if _BACKBONE.match(n) and n not in needed]
    wrong = [n for n in needed if n in tensors and tensors[n].shape != needed[n]]
    found = []
    if missing:
        found.append(f"lacks {len(missing)} tensors of a {place.architecture.name}: ")
        found[-1] += listed(missing)
    if extra:
        found.append(f"has {len(extra)} that a {place.architecture.name} has not: {listed(extra)}")
    if wrong:
        first, hint = wrong[0], _hint(tensors)
        found.append(
            f"has {len(wrong)} tensors of another shape{hint}: `{first}` is "
            f"{tensors[first].shape}, not {needed[first]}"
        )
    if found:
        raise ValueError("; ".join(found))


def _needed(architecture: Architecture) -> Shapes:
    """Without the counters, which are written as 0 where they are absent."""
    shapes = architecture.backbone()
    return {name: shape for name, shape in shapes.items() if not name.endswith(COUNT_SUFFIX)}


def _check_norms(tensors: Tensors) -> None:
    backbone = [name for name in tensors if _BACKBONE.match(name)]
    if any(name.endswith(".running_mean") for name in backbone):
        return
    if any(re.search(r"bn\d\.weight$", name) for name in backbone):
        raise ValueError("has no running_mean: it normalises by GroupNorm, as REMEDIS, or the like")
    raise ValueError("has no BatchNorm: it normalises by InstanceNorm, as dsmil's, or the like")


def _check_depth(tensors: Tensors) -> None:
    """By the blocks of each stage, which name a ResNet152 better than its extra tensors."""
    blocks: dict[str, set[str]] = {}
    for name in tensors:
        if (match := _BLOCK.match(name)) and len(match[1]) < 3:
            blocks.setdefault(match[1], set()).add(match[2])
    counts = tuple(len(blocks.get(str(stage), ())) for stage in range(1, 5))
    known = {architecture.blocks for architecture in ARCHITECTURES.values()}
    if len(blocks) == 4 and all(counts) and counts not in known:
        depths = ", ".join(name.removeprefix("resnet") for name in ARCHITECTURES)
        raise ValueError(f"has stages of {counts} blocks, which is none of the depths {depths}")


def _hint(tensors: Tensors) -> str:
    weight = tensors.get("layer1.0.conv2.weight")
    if weight is None or len(weight.shape) != 4 or weight.shape[:2] == (64, 64):
        return ""
    return " (a ResNeXt)" if weight.shape[0] != weight.shape[1] else " (a wide ResNet)"


def listed(names: list[str]) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(f"`{shown(name)}`" for name in names[:LISTED]) + more


def left_out(found: list[Table], place: Place, kept: set[str]) -> list[str]:
    """One clause for each group of tensors, by the first part of the name, that is not kept."""
    groups: dict[str, int] = {}
    for table in found:
        own = {place.names[name] for name in kept} if table is place.table else set()
        for name in table.tensors.keys() - own:
            group = _group((*table.where, *name.split(".")), place)
            groups[group] = groups.get(group, 0) + 1
    clauses = [f"`{shown(group)}` ({n} tensors) left out" for group, n in sorted(groups.items())]
    more = len(clauses) - 2 * LISTED
    if more > 0:
        clauses[2 * LISTED :] = [f"{more} further groups of tensors left out"]
    return clauses


def _group(parts: tuple[str, ...], place: Place) -> str:
    """The parts that a name shares with the ResNet's, and the first that it does not."""
    common = 0
    for part, own in zip(parts, place.path.split("."), strict=False):
        if part != own:
            break
        common += 1
    return ".".join(parts[: common + 1])
