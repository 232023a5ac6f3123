"""Where the two packages meet: encoders and UNets to PyTorch files, and foreign files to those.

The only module of `jaxhisto` that imports `jaxhisto_export`, inside its functions, since torch
is an extra.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxhisto import tensor_file, unet_weights, weights
from jaxhisto.config import ModelConfig
from jaxhisto.errors import ConfigError, ExportError
from jaxhisto.file_config import ExportConfig, ImportConfig, ZooConfig
from jaxhisto.special_files import special_kind

if TYPE_CHECKING:
    from jaxhisto_export.foreign import Imported

UNET = "unet.safetensors"
Three = tuple[float, float, float]


def export_encoder(config: ExportConfig) -> Path:
    """Writes an encoder or a UNet in a layout, or an encoder's bundle; golden tiles go along.

    Returns:
      The file or folder to verify.

    Raises:
      ExportError, ExportFileError: torch is missing, nothing to export, something there
        already, or a file that cannot be written.
      ConfigError: not exactly one of `out` and `bundle`.
    """
    _need_torch()
    if bool(config.out) == bool(config.bundle):
        raise ConfigError("--out and --bundle: give one of them.")
    encoder, golden = encoder_files(config.run, config.licence, config.stains)
    story = run_story(Path(config.run))
    if config.bundle:
        from jaxhisto_export.bundle import write_bundle

        for path in write_bundle(encoder, config.bundle, golden, story, force=config.force):
            print(f"wrote {path}")
        return Path(config.bundle)
    from jaxhisto_export.layouts import convert, read_encoder

    if config.card:  # before anything is written: no UNet has one
        read_encoder(encoder)
    written = convert(
        encoder,
        config.layout,
        config.out,
        golden,
        config.fc,
        force=config.force,
        normalise=config.normalise,
    )
    if config.card:
        from jaxhisto_export.model_card import write_card

        written += write_card(Path(config.out), encoder, story, written, force=config.force)
    for path in written:
        print(f"wrote {path}")
    return Path(config.out)


def encoder_files(
    name: str, licence: str = "", stains: tuple[str, ...] = ()
) -> tuple[Path, Path | None]:
    """encoder.safetensors and golden.safetensors of a run, an imported encoder or a zoo name.

    Args:
      name: a run folder, a folder that `jaxhisto import` wrote, an encoder.safetensors or
        unet.safetensors, or a name of the zoo, which is downloaded and imported into the cache.
      licence, stains: of a run, written into its encoder.safetensors.

    Raises:
      ExportError, ExportFileError: none of these, or a run without a checkpoint.
    """
    path = Path(name)
    if path.is_dir() and not (path / "data.json").is_file() and not _encoder_in(path).is_file():
        path = path / UNET if (path / UNET).is_file() else path
    if path.is_dir() and ((path / "data.json").is_file() or not _encoder_in(path).is_file()):
        from jaxhisto.pretrain.encoder import write_encoder

        return write_encoder(path, licence, stains or None)
    if licence or stains:
        raise ExportError(
            f"{name}: says its licence and stains itself; give --licence to `jaxhisto import`."
        )
    if path.is_dir():
        return _with_golden(_encoder_in(path))
    if path.is_file() and path.suffix == ".safetensors":
        return _with_golden(path)
    if path.exists():
        raise ExportError(
            f"{name}: is no run and no encoder.safetensors; `jaxhisto import {name} --out DIR` "
            "makes an encoder of it."
        )
    return _with_golden(_from_zoo(name))


def import_file(config: ImportConfig) -> Path:
    """Writes another project's file as encoder.safetensors or unet.safetensors, with golden tiles.

    Returns:
      The encoder.safetensors or unet.safetensors.

    Raises:
      ExportError, ExportFileError: a file that is no ResNet or UNet of ours, one of which nothing
        says how it wants to be fed, or something there already.
    """
    from jaxhisto_export.foreign import read_foreign
    from jaxhisto_export.zoo import locate

    if kind := special_kind(config.file):
        raise ExportError(f"{config.file}: is {kind}, no file; name a file of weights.")
    found = read_foreign(locate(config.file), config.arch or None, config.part)
    weights_file = Path(config.out)
    if weights_file.suffix != ".safetensors":
        weights_file = weights_file / UNET if found.classes else _encoder_in(weights_file)
    golden = golden_beside(weights_file)
    for path in (weights_file, golden):
        if path.exists() and not config.force:
            raise ExportError(f"{path}: exists; pass --force to replace it, or another --out.")
    print(f"{found.path}: {found.architecture.name}, {found.recognised}")
    for note in found.notes:
        print(f"note: {note}")
    if config.class_names and not found.classes:
        raise ConfigError(f"--class-names: {found.path} gives an encoder, which has no classes.")
    mean, std = _feeding(config, found)
    write = _write_unet if found.classes else _write_encoder
    write(config, found, mean, std, weights_file, golden)
    print(f"wrote {weights_file}\nwrote {golden}")
    return weights_file


def _write_encoder(
    config: ImportConfig, found: Imported, mean: Three, std: Three, encoder: Path, golden: Path
) -> None:
    from jaxhisto.pretrain.encoder import write_golden

    arch = found.architecture.name
    metadata = _metadata(config, found, mean, std)
    weights.from_torch(found.tensors, arch, str(found.path), found.projection)  # or it is refused
    encoder.parent.mkdir(parents=True, exist_ok=True)
    digest = tensor_file.write(encoder, found.tensors, metadata)
    model = ModelConfig(arch, mean=mean, std=std)  # type: ignore[arg-type]
    write_golden(golden, encoder, model, int(metadata["tile_px"]), digest)


def _write_unet(
    config: ImportConfig, found: Imported, mean: Three, std: Three, unet: Path, golden: Path
) -> None:
    arch = found.architecture.name
    metadata = _unet_metadata(config, found, mean, std)
    params, stats = unet_weights.from_torch(found.tensors, arch, str(found.path), found.classes)
    unet.parent.mkdir(parents=True, exist_ok=True)
    digest = tensor_file.write(unet, found.tensors, metadata)
    unet_weights.write_golden(golden, params, stats, metadata, digest)


def verify_file(path: str, against: str = "") -> int:
    """Prints what was checked, problems on stderr; returns 0, or 1 with a problem."""
    if (Path(path) / "data.json").is_file():
        raise ExportError(
            f"{path}: is a run, no file to check; `jaxhisto export {path} --out encoder.ckpt` "
            "writes one."
        )
    _need_torch()
    from jaxhisto_export.against import compare
    from jaxhisto_export.verify import verify

    result = verify(path)
    if against:
        compare(Path(path), Path(against), result)
    print("\n".join(result.lines))
    for problem in result.problems:
        print(f"jaxhisto verify: {problem}", file=sys.stderr)
    return 0 if result.ok else 1


def zoo(config: ZooConfig) -> Path | None:
    """Prints the registry, or fetches a file of it and returns where it lies."""
    from jaxhisto_export import zoo as registry

    if config.action == "list":
        print(registry.table())
        return None
    if not config.name:
        raise ConfigError("zoo get: give a name; `jaxhisto zoo list` shows them.")
    path = registry.get(config.name, config.source, unchecked=config.unchecked)
    print(path)
    return path


def run_story(run: Path) -> dict[str, Any]:
    """What a model card tells of a run beyond its settings; empty for what is no run.

    Returns:
      `data` (data.json), `environment` (env.json), `losses` ([step, loss] of the first, last
      and some steps between), `curve` (path of loss.png), `scores` (records of probes), `leakage`
      (records of `jaxhisto leakage` on the data that it was trained on).
    """
    if not (run / "data.json").is_file():
        return {}
    from jaxhisto.runlog import read_metrics

    metrics = read_metrics(run)
    every = max(1, len(metrics) // 8)
    records = [json.loads(p.read_text()) for p in sorted(run.glob("probe*.json"))]
    story: dict[str, Any] = {
        "data": json.loads((run / "data.json").read_text()),
        "losses": [[m["step"], m["loss"]] for m in [*metrics[:-1:every], *metrics[-1:]]],
        "scores": [r for r in records if "rows" in r],  # those of `jaxhisto probe` have none
    }
    checks = [json.loads(p.read_text()) for p in sorted(run.glob("leakage*.json"))]
    story["leakage"] = [c for c in checks if c["pretraining"]["hash"] == story["data"]["hash"]]
    if (run / "env.json").is_file():
        story["environment"] = json.loads((run / "env.json").read_text())
    if (run / "loss.png").is_file():
        story["curve"] = run / "loss.png"
    return story


def golden_beside(encoder: Path) -> Path:
    """golden.safetensors of an encoder.safetensors, else NAME.golden.safetensors, of UNets too."""
    if encoder.name == "encoder.safetensors":
        return encoder.with_name("golden.safetensors")
    return encoder.with_name(encoder.name + ".golden.safetensors")


def _encoder_in(folder: Path) -> Path:
    return folder / "encoder.safetensors"


def _with_golden(encoder: Path) -> tuple[Path, Path | None]:
    golden = golden_beside(encoder)
    return encoder, golden if golden.is_file() else None


def _from_zoo(name: str) -> Path:
    """The encoder.safetensors of a zoo file, imported beside it on first use."""
    from jaxhisto_export.zoo import find, get

    find(name)
    file = get(name)
    folder = file.with_name(file.name + ".imported")
    if golden_beside(_encoder_in(folder)).is_file():
        return _encoder_in(folder)
    return import_file(ImportConfig(file=str(file), out=str(folder), force=True))


def _feeding(config: ImportConfig, found: Imported) -> tuple[Three, Three]:
    """mean and std: as the file says, else as the user says; never a guess."""
    if (config.mean is None) != (config.std is None):
        raise ConfigError("--mean and --std: give both, or none of them.")
    if found.feeding is None:
        if config.mean is None or config.std is None:
            raise ExportError(
                f"{found.path}: does not say how it wants to be fed; give --mean and --std, such "
                "as --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 (ImageNet's)."
            )
        return config.mean, config.std
    said = _three(found.feeding.mean), _three(found.feeding.std)
    if config.mean is not None and (config.mean, config.std) != said:
        raise ExportError(
            f"{found.path}: wants mean {list(said[0])} and std {list(said[1])} "
            f"({found.feeding.source}); leave --mean and --std out."
        )
    print(f"mean {list(said[0])}, std {list(said[1])}: {found.feeding.source}")
    return said


def _three(values: Any) -> Three:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _metadata(
    config: ImportConfig, found: Imported, mean: tuple[float, ...], std: tuple[float, ...]
) -> Mapping[str, str]:
    """The metadata of the new encoder: the file's own, where it is one of ours."""
    from jaxhisto_export.provenance import ENCODER_FIELDS, to_strings

    source = _source(found)
    if ENCODER_FIELDS.keys() <= found.provenance.keys():
        kept = {
            k: found.provenance[k] for k in (*ENCODER_FIELDS, "source") if k in found.provenance
        }
        kept |= {"format": weights.FORMAT, "projection_width": found.projection}
        return to_strings(kept | {"source": kept.get("source", source)})
    licence = config.licence or (found.feeding.licence if found.feeding else "")
    return weights.describe_imported(
        found.architecture.name,
        found.projection,
        mean,
        std,
        tile_px=config.tile_px,
        mpp_range=config.mpp_range,
        licence=licence,
        source=source,
    )


def _unet_metadata(
    config: ImportConfig, found: Imported, mean: Three, std: Three
) -> Mapping[str, str]:
    """The metadata of the new UNet: the file's own, where it is one of ours."""
    from jaxhisto_export.provenance import UNET_FIELDS, to_strings

    if UNET_FIELDS.keys() <= found.provenance.keys():
        if config.class_names and list(config.class_names) != found.provenance["class_names"]:
            raise ExportError(
                f"{found.path}: says the names of its classes itself, "
                f"{found.provenance['class_names']}; leave --class-names out."
            )
        kept = {k: v for k, v in found.provenance.items() if k in (*UNET_FIELDS, "source")}
        return to_strings({"source": _source(found)} | kept | {"format": unet_weights.FORMAT})
    return unet_weights.describe(
        found.architecture.name,
        found.classes,
        config.class_names or None,
        mean=mean,
        std=std,
        tile_px=config.tile_px,
        mpp_range=config.mpp_range,
        licence=config.licence or (found.feeding.licence if found.feeding else ""),
        source=_source(found),
    )


def _source(found: Imported) -> dict[str, str]:
    return {"file": found.path.name, "sha256": found.sha256, "recognised": found.recognised}


def _need_torch() -> None:
    """Says so before any work is done that needs it."""
    if importlib.util.find_spec("torch") is None:
        raise ExportError("torch is not installed; pip install 'jaxhisto[export]'.")
