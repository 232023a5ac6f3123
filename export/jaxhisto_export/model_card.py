"""The model card: README.md in the form that model hubs show, written from the files alone.

Front matter, what it is and is not, preprocessing as code, origin, training, scores where there
are any, checksums. What nobody stated is said to be unknown; nothing is made up.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.provenance import Provenance
from jaxhisto_export.weights_file import file_sha256, read_weights

Story = Mapping[str, Any]

PAPER = "https://doi.org/10.1016/j.mlwa.2021.100198"
UNKNOWN = "not stated"
LICENCES = {"mit", "apache-2.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc0-1.0", "gpl-3.0"}
"""Those that hubs know by these names; any other goes in as `other` with its own name."""

LOADING = {
    "torchvision.pth": """import torch, torchvision

net = torchvision.models.{arch}()
net.fc = torch.nn.Identity()
net.load_state_dict(torch.load("torchvision.pth", weights_only=True), strict=True)
net.eval()""",
    "model.safetensors": """import timm  # 1.0.29 or later

net = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))""",
    "encoder.onnx": """import onnxruntime

session = onnxruntime.InferenceSession("encoder.onnx")
features = session.run(None, {{session.get_inputs()[0].name: x}})[0]""",
}
PREPROCESSING = {
    "torchvision": """import torch
from torchvision.transforms import v2

preprocess = v2.Compose([
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),  # RGB in 0..1
    v2.Normalize(mean={mean}, std={std}),
])  # no resize: feed tiles of the training um/px""",
    "numpy": """import numpy as np

def preprocess(tiles):  # (n, H, W, 3) uint8 RGB -> (n, 3, H, W) float32
    x = (tiles / 255.0 - np.array({mean})) / np.array({std})
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), dtype=np.float32)""",
}


def write_card(
    exported: Path, encoder: Path, story: Story, files: Iterable[Path], *, force: bool = False
) -> list[Path]:
    """Writes README.md (and loss.png, where there is one) beside an exported file or in a folder.

    Args:
      exported: the file, or the folder of layout timm.
      encoder: the encoder.safetensors that it was made of.
      story: what is known of the run (see `card`).
      files: what was written, for the checksums.
      force: replace a README.md that is there.

    Raises:
      ExportFileError: a README.md is there, or the card cannot be written.
    """
    folder = exported if exported.is_dir() else exported.parent
    path = folder / "README.md"
    if path.exists() and not force:
        raise ExportFileError(f"{path}: exists, pass --force to replace it.")
    text = card(read_weights(encoder).provenance, story, list(files))
    written = [path]
    try:
        path.write_text(text, encoding="utf-8")
        if "curve" in story:
            shutil.copyfile(story["curve"], folder / "loss.png")
            written.append(folder / "loss.png")
    except OSError as error:
        raise ExportFileError(
            f"{path}: cannot be written ({error.strerror}), make room or name another place."
        ) from error
    return written


def card(provenance: Provenance, story: Story, files: list[Path]) -> str:
    """The text of the card.

    Args:
      provenance: what the encoder says of itself.
      story: `data`, `environment`, `losses`, `curve`, `scores`, `leakage` of the run, each where
        known.
      files: files to list with size and SHA-256; they lie beside the card.
    """
    sections = [
        _front_matter(provenance),
        _what(provenance),
        _feeding(provenance),
        _loading(provenance, {f.name for f in files}),
        _origin(provenance, story),
        _training(provenance, story),
        _scores(story),
        _rights(provenance),
        _files(files),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _front_matter(p: Provenance) -> str:
    licence = p["licence"].strip()
    known = licence.lower() in LICENCES
    lines = ["---", f"license: {licence.lower() if known else 'other' if licence else 'unknown'}"]
    if licence and not known:
        lines.append(f"license_name: {json.dumps(licence)}")
    tags = ["histopathology", "pathology", "self-supervised", "simclr", p["arch"]]
    lines += ["library_name: timm", "pipeline_tag: image-feature-extraction", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _what(p: Provenance) -> str:
    head = (
        f"The pretraining's projection ({p['feature_width']} to {p['projection_width']}) lies in "
        "the layouts `published` and `dsmil`; it is no classifier either."
        if p["projection_width"]
        else "There is no head of any kind in it."
    )
    source = p.get("source")
    how = (
        f"read from `{source['file']}` ({source['recognised']})"
        if isinstance(source, dict)
        else f"pretrained by SimCLR, without labels, for {p['step']} steps"
    )
    return f"""# {p["arch"]} for histopathology tiles

An encoder, {how}: an RGB tile goes in, {p["feature_width"]} numbers come out.

**What it is not**: a classifier. No diagnosis, class or score comes out of it, and it was not
tested for clinical use. {head}"""


def _feeding(p: Provenance) -> str:
    mpp = p["mpp_range"]
    span = f"{mpp[0]:g} to {mpp[1]:g} um/px" if mpp else f"um/px {UNKNOWN}"
    rows = [
        ("input", f"{p['channel_order']}, values {p['value_range'][0]:g}..{p['value_range'][1]:g}"),
        ("mean", f"{p['mean']}"),
        ("std", f"{p['std']}"),
        ("tile side in training", f"{p['tile_px']} px"),
        ("pixel size in training, where known", span),
        ("stains in training", ", ".join(p["stains"]) if p["stains"] else UNKNOWN),
        ("features", f"{p['feature_width']}, after global average pooling"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    codes = "\n\n".join(
        f"With {name}:\n\n```python\n{code.format(mean=p['mean'], std=p['std'])}\n```"
        for name, code in PREPROCESSING.items()
    )
    return f"## How to feed it\n\n| | |\n|---|---|\n{table}\n\n{codes}"


def _loading(p: Provenance, names: set[str]) -> str:
    codes = [
        f"`{name}`:\n\n```python\n{code.format(arch=p['arch'])}\n```"
        for name, code in LOADING.items()
        if name in names
    ]
    any_of_them = (
        "Any file of this folder, with preprocessing and a check at load "
        '(`pip install "jaxhisto[export]"`):\n\n```python\nimport jaxhisto_export\n\n'
        'encoder = jaxhisto_export.load_encoder("FILE")\nfeatures = encoder.features(tiles)'
        "  # (n, H, W, 3) uint8 RGB\n```"
    )
    return "## How to load it\n\n" + "\n\n".join([*codes, any_of_them])


def _origin(p: Provenance, story: Story) -> str:
    data = story.get("data", {})
    lines = [f"- hash of the training tiles: `{p['data_hash']}`"]
    if p.get("manifest"):
        lines.append(f"- drawn by the manifest with SHA-256 `{p['manifest']}`")
    if data:
        lines.append(f"- tiles: {data['tiles']}, dropped: {len(data['dropped'])}")
        lines.append("\n```\n" + _without_folders(str(data["summary"])) + "\n```\n")
    chosen = p["config"].get("data", {}) if isinstance(p["config"], dict) else {}
    if chosen.get("exclude"):
        lines.append(f"- left out by name: {', '.join(f'`{e}`' for e in chosen['exclude'])}")
    source = p.get("source")
    if isinstance(source, dict):
        lines.append(f"- imported from `{source['file']}`, SHA-256 `{source['sha256']}`")
    checked = story.get("leakage", [])
    lines += [_leakage(record, each) for record in checked for each in record["against"]]
    lines.append(
        f"- leakage: overlap between the training tiles and {'other' if checked else 'any'} test "
        f"set{'s' if checked else ''} was **not checked**; slides or patients of yours that may be "
        "among them give scores that are too good"
    )
    return "## What it was trained on\n\n" + "\n".join(lines)


def _leakage(record: Mapping[str, Any], against: Mapping[str, Any]) -> str:
    """What a check against one labelled set found, and by which measure."""
    counts, limits = against["counts"], record["thresholds"]
    kinds = ("file", "pixels", "near", "part")
    images = ", ".join(
        f"{counts[kind]['images']} {words}"
        for kind, words in zip(
            kinds,
            ("of the same file", "of the same pixels", "near-identical", "in part"),
            strict=True,
        )
        if kind != "part" or limits["parts"]
    )
    verdict = "**overlap found**" if against["overlap"] else "no overlap found"
    return (
        f"- leakage, checked against `{against['name']}` ({against['images']} images, hash "
        f"`{against['hash'][:12]}`) on {record['date'][:10]}: {verdict}; {images}"
        f"{'' if limits['parts'] else ', pieces not looked for'}; shared slides "
        f"{counts['slide']['ids']}, shared patients {counts['patient']['ids']} (as far as names "
        f"say); {against['too_flat']} images too flat to tell; hashes within "
        f"{limits['distance_bits_of_63']} of 63 bits, correlation from {limits['correlation']:g}"
    )


def _without_folders(summary: str) -> str:
    """Each store by its own name: where it lay is nobody's business."""
    return re.sub(
        r"^(  )(.*?)(?=: )", lambda m: m[1] + Path(m[2]).name, summary, flags=re.MULTILINE
    )


def _training(p: Provenance, story: Story) -> str:
    config = p["config"]
    if not config:
        return "## Training\n\nNot by this project: its settings are not stated in the file."
    lines = [f"- {p['step']} steps, code version {p['code_version']}"]
    where = story.get("environment", {})
    if where:
        devices = sorted(set(where.get("devices", [])))
        lines.append(f"- on {'; '.join([*devices, where.get('machine', UNKNOWN)])}")
    if story.get("losses"):
        pairs = ", ".join(f"{loss:.3f} at {step}" for step, loss in story["losses"])
        lines.append(f"- NT-Xent loss: {pairs}")
    text = "## Training\n\n" + "\n".join(lines)
    if "curve" in story:
        text += "\n\n![loss curve](loss.png)"
    settings = f"```json\n{json.dumps(config, indent=1)}\n```"
    return f"{text}\n\n<details><summary>All settings</summary>\n\n{settings}\n\n</details>"


def _scores(story: Story) -> str:
    rows = [row for record in story.get("scores", []) for row in record["rows"]]
    if not rows:
        return "## Scores\n\nNone were measured."
    table = "\n".join(
        f"| {row['encoder']} | {row['auc_mean']:.3f} | {min(row['auc']):.3f} to "
        f"{max(row['auc']):.3f} | {row['macro_f1_mean']:.3f} |"
        for row in rows
    )
    return (
        "## Scores\n\nFrozen features, logistic regression, a test group that was never trained "
        "on; the range is over bootstrap draws of the probe's training tiles.\n\n"
        f"| encoder | AUC | range | macro F1 |\n|---|---|---|---|\n{table}"
    )


def _rights(p: Provenance) -> str:
    licence = p["licence"] or "not decided: ask whoever gave you the files before you use them"
    return f"""## Licence and citation

Licence of the weights: {licence}.

The method is "Self supervised contrastive learning for digital histopathology" (Ciga, Xu and
Martel, Machine Learning with Applications 7, 2022, [doi]({PAPER})); the files were written by
jaxhisto {p["code_version"]}."""


def _files(files: list[Path]) -> str:
    rows = "\n".join(
        f"| `{f.name}` | {f.stat().st_size:,} | `{file_sha256(f)}` |"
        for f in sorted(files)
        if f.is_file()
    )
    return f"## Files\n\n| file | bytes | SHA-256 |\n|---|---|---|\n{rows}"
