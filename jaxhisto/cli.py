"""The command line: one function a verb. Parses first, imports the stage afterwards."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

from jaxhisto import __version__
from jaxhisto.bench_config import BenchConfig
from jaxhisto.config import (
    DemoConfig,
    DistributedConfig,
    DoctorConfig,
    PlotConfig,
    PretrainConfig,
    TileConfig,
)
from jaxhisto.console import say_next
from jaxhisto.downstream_verbs import VERBS as DOWNSTREAM
from jaxhisto.errors import ConfigError, JaxhistoError
from jaxhisto.file_config import (
    CatalogConfig,
    ExportConfig,
    ImportConfig,
    LeakageConfig,
    SampleConfig,
    VerifyConfig,
    ZooConfig,
)
from jaxhisto.flags import parse
from jaxhisto.launch import MEMBER, Launch, find
from jaxhisto.runlog import run_record, versions_record


def demo(argv: Sequence[str]) -> int:
    """the whole chain on a slide that ships with scikit-image, or on your own"""
    config = parse(DemoConfig, argv, "demo")
    from jaxhisto.demo import run_demo

    return run_demo(config)


def catalog(argv: Sequence[str]) -> int:
    """the datasets that the paper pretrained on, and where to get them"""
    config = parse(CatalogConfig, argv, "catalog")
    from jaxhisto.data.catalog import listing

    print("\n".join(listing(config)))
    return 0


def tile(argv: Sequence[str]) -> int:
    """slides -> a store of foreground tiles"""
    config = parse(TileConfig, argv, "tile")
    from jaxhisto.slides.tiling import tile as cut

    result = cut(config)
    print("\n".join(result.summary()))
    if result.exit_code:
        return result.exit_code
    tiles = result.manifest["tiles"]
    recipe = "pretrain_resnet18" if tiles >= 512 else "pretrain_small"
    batch = f" --batch-size {tiles}" if tiles < 64 else ""
    say_next(f"jaxhisto pretrain {recipe} --data.stores {quote(config.out)}{batch} --out RUN")
    return 0


def sample(argv: Sequence[str]) -> int:
    """stores and image folders -> a frozen list of drawn tiles (manifest)"""
    config = parse(SampleConfig, argv, "sample")
    from jaxhisto.data.manifest import write_manifest
    from jaxhisto.data.sampling import sample as draw

    drawn = draw(config)
    write_manifest(config.out, drawn.manifest)
    print("\n".join(drawn.summary()))
    stores = " ".join(quote(path) for path in drawn.paths)
    say_next(
        f"jaxhisto pretrain --data.manifest {quote(config.out)} --data.stores {stores} --out RUN"
    )
    return 0


def leakage(argv: Sequence[str]) -> int:
    """does what was pretrained on overlap with an evaluation set?"""
    config = parse(LeakageConfig, argv, "leakage")
    from jaxhisto.leakage.check import check

    result = check(config)
    print("\n".join(result.lines))
    if result.overlap and config.fail:
        print(f"jaxhisto leakage: {result.lines[-2]}", file=sys.stderr)
        return 1
    return 0


def pretrain(argv: Sequence[str]) -> int:
    """tiles -> a trained encoder (SimCLR)"""
    config = parse(PretrainConfig, argv, "pretrain")
    if config.deterministic:
        from jaxhisto.xla_flags import make_deterministic

        make_deterministic(config.out)
    else:  # of a program that was kept, autotuning would find nothing to write down
        from jaxhisto.compile_cache import keep_compiled

        keep_compiled()
    launch = several(config.distributed)
    if launch is not None:
        from jaxhisto.supervise import supervise

        check_init(config.init)
        return supervise(launch, "pretrain", argv, run_record(config), config.out, debugging())
    from jaxhisto.pretrain.stopping import stop_requests

    # Importing JAX takes seconds, in which a request may come.
    with stop_requests(config.out, at_once=True):
        from jaxhisto.distributed import held_together, main_first
        from jaxhisto.pretrain.run import pretrain as train

        with held_together():
            if config.init:
                from jaxhisto.torch_files import encoder_files

                # One after the other: all may share the cache that a file is downloaded into.
                files = main_first(lambda: encoder_files(config.init))
                config = replace(config, init=str(files[0]))
            out = train(config)
    say_next(f"jaxhisto export {quote(str(out))} --layout published --out encoder.ckpt")
    return 0


def export(argv: Sequence[str]) -> int:
    """a run or an encoder -> PyTorch, timm and ONNX files, or a folder to upload"""
    config = parse(ExportConfig, argv, "export")
    from jaxhisto.torch_files import export_encoder

    say_next(f"jaxhisto verify {quote(str(export_encoder(config)))}")
    return 0


def import_(argv: Sequence[str]) -> int:
    """another project's ResNet or Unet file -> one of ours, its pickle never executed"""
    config = parse(ImportConfig, argv, "import")
    from jaxhisto.torch_files import import_file

    say_next(f"jaxhisto verify {quote(str(import_file(config)))}")
    return 0


def verify(argv: Sequence[str]) -> int:
    """check an exported file against a stock torchvision ResNet, or against another file"""
    config = parse(VerifyConfig, argv, "verify")
    from jaxhisto.torch_files import verify_file

    return verify_file(config.file, config.against)


def zoo(argv: Sequence[str]) -> int:
    """published encoders: list them, or get one"""
    config = parse(ZooConfig, argv, "zoo")
    from jaxhisto.torch_files import zoo as fetch

    path = fetch(config)
    if path is not None:
        say_next(f"jaxhisto import {quote(str(path))} --out {quote(config.name)}")
    return 0


def plot(argv: Sequence[str]) -> int:
    """runs over each other in one picture: loss, similarities, probes, ranks, speed"""
    config = parse(PlotConfig, argv, "plot")
    from jaxhisto.overlay import plot_runs

    print(f"{plot_runs(config)}: {len(config.runs)} runs")
    return 0


def doctor(argv: Sequence[str]) -> int:
    """what is installed, whether it works, and what to do where it does not"""
    config = parse(DoctorConfig, argv, "doctor")
    launch = several(config.distributed) if config.pod else None
    if launch is not None:
        from jaxhisto.supervise import supervise

        return supervise(launch, "doctor", argv, versions_record(), debug=debugging())
    from jaxhisto.doctor import examine

    return examine(config)


def bench(argv: Sequence[str]) -> int:
    """how quick training is on this machine, stage by stage, and what holds it up"""
    config = parse(BenchConfig, argv, "bench", recipe=False)
    from jaxhisto.bench.verb import bench as run

    return run(config)


def check_init(init: str) -> None:
    """Refuses to start several processes from a run folder, whose export is one process's work.

    Raises:
      ConfigError: with the file to name instead.
    """
    if (Path(init) / "data.json").is_file():
        file = Path(init) / "encoder.safetensors"
        raise ConfigError(
            f"--init {init}: is a run, which several processes cannot export; run `jaxhisto export "
            f"{quote(init)} --layout published --out encoder.ckpt` once and pass --init {file}."
        )


def several(config: DistributedConfig) -> Launch | None:
    """This process's place where several are to work together and nobody has placed it yet."""
    return None if MEMBER in os.environ else find(config, os.environ)


def debugging() -> bool:
    """Whether `--debug` is on."""
    return logging.getLogger("jaxhisto").isEnabledFor(logging.DEBUG)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    f.__name__.rstrip("_"): f
    for f in (
        demo,
        catalog,
        tile,
        sample,
        leakage,
        pretrain,
        export,
        import_,
        verify,
        zoo,
        *DOWNSTREAM,
        plot,
        bench,
        doctor,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns 0, 1 (failure, one sentence on stderr), 2 (usage), 75 (stopped)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    logging.getLogger("jaxhisto").setLevel(logging.DEBUG if debug else logging.INFO)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"jaxhisto {__version__}")
        return 0
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        print(f"jaxhisto: no verb {verb!r}; one of {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    try:
        return VERBS[verb](rest)
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"jaxhisto {verb}: {sentence(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        print(f"jaxhisto {verb}: interrupted; the same line goes on.", file=sys.stderr)
        return 130


def sentence(error: Exception) -> str:
    """The error as one line: ours as they are, others with their kind and the way to more."""
    if isinstance(error, JaxhistoError) or type(error).__module__.startswith("jaxhisto_export"):
        return str(error)
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return f"{error.filename or 'a file'}: {error.strerror}; {_REMEDIES[error.errno]}."
    text = " ".join(str(error).split())[:300]
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)."


_REMEDIES = {
    errno.ENOSPC: "free some space and start the same line again",
    errno.EDQUOT: "free some of the quota and start the same line again",
    errno.EROFS: "give --out a folder that can be written",
    errno.EACCES: "mend its permissions or give another folder",
    errno.EPERM: "mend its permissions or give another folder",
    errno.ENOENT: "check the name",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOTDIR: "give a folder, not a file",
}


def usage() -> str:
    """What `jaxhisto --help` prints."""
    verbs = "\n".join(f"  {name:<10} {f.__doc__}" for name, f in VERBS.items())
    return (
        f"jaxhisto {__version__}: slides to tiles, tiles to SimCLR encoders, those to PyTorch.\n\n"
        f"usage: jaxhisto VERB [CONFIG.toml] [--flags] [--debug]\n\n{verbs}\n\n"
        "jaxhisto VERB --help lists a verb's settings."
    )


if __name__ == "__main__":
    sys.exit(main())
