"""The folder of predicted masks: what is there is kept, what was made otherwise is refused.

OUT/predictions.json holds how all of its masks were made, and an entry a mask; it is written before
the first mask and after each, so that a line that was ended goes on with the next one.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxhisto import __version__, settings
from jaxhisto.errors import RunError
from jaxhisto.runlog import write_atomically

FORMAT = "jaxhisto-predictions-2"
RECORD, LOCK = "predictions.json", ".lock"
NOWHERE = 255
"""In the mask of a slide: the file has no pixel here."""

Entry = dict[str, Any]


class Predictions:
    """The entries of a folder, by the input's name; see `open_predictions`."""

    def __init__(self, out: Path, how: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
        self.out, self._how, self._entries = out, dict(how), dict(entries)

    def kept(self, name: str) -> Entry | None:
        """The entry of what an earlier start finished."""
        return self._entries.get(name)

    def add(self, entry: Entry) -> None:
        """One more mask is there."""
        self._entries[entry["name"]] = entry
        self.write()

    def write(self) -> None:
        """Puts predictions.json there, whole.

        Raises:
          RunError: it cannot be written.
        """
        content = {
            "format": FORMAT,
            **self._how,
            "nowhere": NOWHERE,
            "code_version": __version__,
            "inputs": [self._entries[name] for name in sorted(self._entries)],
        }
        try:
            write_atomically(self.out / RECORD, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise cannot_write(self.out, error) from error


@contextmanager
def open_predictions(
    out: Path, how: Mapping[str, Any], inputs: Mapping[str, str], force: bool = False
) -> Iterator[Predictions]:
    """The folder, made or gone on with, and held for this process.

    Args:
      out: the folder.
      how: what makes two masks of one input the same: UNet, windows, pixel sizes; JSON.
      inputs: by name, what tells whether an input was changed (`file_stamp`).
      force: make the masks of these inputs anew, whatever is there.

    Raises:
      RunError: masks that are not known to be these, another process at work, or it cannot be
        written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("w")
    except OSError as error:
        raise cannot_write(out, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{out}: another process predicts into it; wait for that one."
            ) from error
        found = Predictions(out, how, _known(out, how, inputs, force))
        found.write()
        yield found


def mask_path(out: Path, name: str) -> Path:
    """The mask of an input."""
    return out / f"{name}.mask.png"


def overlay_path(out: Path, name: str) -> Path:
    """The picture of an input with its mask over it."""
    return out / f"{name}.overlay.png"


def written_in(out: Path, inputs: Iterable[str]) -> set[Path]:
    """What lines into OUT wrote, below OUT: of inputs in predictions.json, and of `inputs`, whose
    mask may be there and not yet in it. Empty where no line has begun.

    Raises:
      RunError: predictions.json is none of this version's.
    """
    record = _read(out)
    if not record:
        return set()
    names = [*inputs, *(entry["name"] for entry in record["inputs"])]
    return {at(Path(), name) for name in names for at in (mask_path, overlay_path)}


def cannot_write(out: Path, error: OSError) -> RunError:
    return RunError(f"{out}: cannot be written ({error.strerror}); give another --out.")


def _known(
    out: Path, how: Mapping[str, Any], inputs: Mapping[str, str], force: bool
) -> dict[str, Entry]:
    """The entries that stay: of other inputs, and of these where the mask is theirs."""
    content = _read(out)
    other = settings.differences(
        {k: content.get(k) for k in how}, json.loads(json.dumps(dict(how)))
    )
    entries = {entry["name"]: entry for entry in content["inputs"]} if content and not other else {}
    if force:
        return {name: entry for name, entry in entries.items() if name not in inputs}
    there = [name for name in inputs if mask_path(out, name).exists()]
    if other and content and (content["inputs"] or there):
        raise RunError(
            f"{out}: holds masks that were made otherwise ({'; '.join(other)}); pass --force to "
            "replace them, or another --out."
        )
    if there and not content:
        raise RunError(
            f"{mask_path(out, there[0])}: is there already ({len(there)} of {len(inputs)} masks "
            "are); pass --force to replace them, or another --out."
        )
    changed = [n for n in there if n in entries and entries[n].get("stamp") != inputs[n]]
    if changed:
        raise RunError(
            f"{mask_path(out, changed[0])}: its image was changed since ({len(changed)} of "
            f"{len(inputs)} were); pass --force to make the masks anew, or another --out."
        )
    return {name: e for name, e in entries.items() if name not in inputs or name in there}


def _read(out: Path) -> dict[str, Any]:
    """What predictions.json holds; empty without one."""
    try:
        content = json.loads((out / RECORD).read_text(encoding="utf-8"))
        if content["format"] == FORMAT:
            return dict(content)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RunError(
        f"{out / RECORD}: is none of this version's; give another --out, or remove the folder."
    )
