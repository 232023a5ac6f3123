"""The verbs of this stage for the command line; importing them loads no JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from shlex import quote

from jaxhisto.console import counted, say, say_next, warn
from jaxhisto.downstream_config import (
    ClusterConfig,
    EmbedConfig,
    ProbeConfig,
    RetrieveConfig,
    SheetConfig,
    StudyConfig,
)
from jaxhisto.flags import parse
from jaxhisto.training_config import ClassifyConfig, FinetuneConfig, PredictConfig, SegmentConfig


def embed(argv: Sequence[str]) -> int:
    """tiles, images or whole slides -> their features in an HDF5 file"""
    config = parse(EmbedConfig, argv, "embed")
    with _endable(config.out, "embed"):
        from jaxhisto.downstream.embed import embed as run

        done = run(config)
    kept = f", {done.earlier:,} of them from an earlier start" if done.earlier else ""
    say(f"{done.out}: {done.rows:,} x {done.width} features{kept}")
    if done.per_slide:
        say(f"{config.per_slide}: {len(done.per_slide):,} slides")
    out = quote(str(done.out))
    if done.of_slides:
        say_next(f"jaxhisto cluster {out} --out CLUSTERS")
    else:
        say_next(f"jaxhisto probe {out} --task.data FOLDER --out probe.json")
    return 0


def probe(argv: Sequence[str]) -> int:
    """what frozen features are worth on a task: last layer, linear probe, neighbours"""
    config = parse(ProbeConfig, argv, "probe")
    with _endable(config.out, "probe"):
        from jaxhisto.downstream.probe import run_probe

        run_probe(config)
    say(f"wrote {config.out}")
    return 0


def finetune(argv: Sequence[str]) -> int:
    """an encoder and a task -> the trained network, with its scores"""
    config = parse(FinetuneConfig, argv, "finetune")
    with _endable(config.out, "finetune"):  # before and after training, which saves what it did
        from jaxhisto.downstream.finetune import run_finetune

        run_finetune(config)
    say(f"wrote {config.out}")
    say_next(f"jaxhisto classify {quote(config.out)} IMAGES --out predictions.csv")
    return 0


def classify(argv: Sequence[str]) -> int:
    """what a fine-tuned encoder says of tiles, images or whole slides, as a CSV file"""
    config = parse(ClassifyConfig, argv, "classify")
    with _endable(config.out, "classify"):
        from jaxhisto.downstream.classify import run_classify

        tiles = run_classify(config)
    say(f"{config.out}: {counted(tiles, 'tile')}")
    return 0


def segment(argv: Sequence[str]) -> int:
    """images with masks -> a UNet on an encoder, and its macro F1"""
    config = parse(SegmentConfig, argv, "segment")
    with _endable(config.out, "segment"):  # as of finetune
        from jaxhisto.downstream.segment import segment as train

        train(config)
    say(f"wrote {config.out}")
    say_next(f"jaxhisto predict IMAGES --unet {quote(config.out)} --out MASKS")
    return 0


def predict(argv: Sequence[str]) -> int:
    """a trained UNet on images or whole slides -> masks and overlays"""
    config = parse(PredictConfig, argv, "predict")
    with _endable(config.out, "predict"):
        from jaxhisto.downstream.predict import predict as run

        masks = len(run(config))
    say(f"{config.out}: {counted(masks, 'mask')}")
    return 0


def cluster(argv: Sequence[str]) -> int:
    """features -> clusters: their number by elbow, sheets, painted slides, tiles picked"""
    config = parse(ClusterConfig, argv, "cluster")
    from jaxhisto.clusters.cluster import cluster as run

    done = run(config)
    for line in done.lines:
        say(line)
    if done.picked is not None:
        stores = " ".join(map(quote, config.show.tiles))
        picked = quote(str(done.picked))
        say_next(f"jaxhisto pretrain --data.manifest {picked} --data.stores {stores} --out RUN")
    else:
        given = {"tiles": config.show.tiles, "slides": config.show.slides}
        shown = [f" --show.{k} {' '.join(map(quote, v))}" for k, v in given.items() if v]
        out = f"--query NAME{''.join(shown)} --out NEAREST.png"
        say_next(f"jaxhisto retrieve {quote(config.features)} {out}")
    return 0


def retrieve(argv: Sequence[str]) -> int:
    """the tiles that are most like a tile, as a sheet"""
    config = parse(RetrieveConfig, argv, "retrieve")
    from jaxhisto.clusters.retrieve import retrieve as run

    out = run(config)
    many = f"{len(config.query):,} {'query' if len(config.query) == 1 else 'queries'}"
    say(f"{out}, {out.with_suffix('.csv').name}: {many}")
    return 0


def sheet(argv: Sequence[str]) -> int:
    """tiles of many datasets on one sheet: how diverse is what you train on?"""
    config = parse(SheetConfig, argv, "sheet")
    from jaxhisto.clusters.retrieve import diversity

    out, tiles, datasets = diversity(config)
    say(f"{out}: {counted(tiles, 'tile')} of {counted(datasets, 'dataset')}")
    return 0


def study(argv: Sequence[str]) -> int:
    """encoders x tasks x shares of the labels: tables, figures, intervals, tests"""
    config = parse(StudyConfig, argv, "study", recipe=False)
    from jaxhisto.study.run import run_study

    done = run_study(config)
    if config.plan:
        return 0
    say(f"{done.out / 'report.html'}: {done.cells - len(done.failures):,} of {done.cells:,} cells")
    if done.failures:
        failed = counted(len(done.failures), "cell")
        warn(
            f"{failed} failed, as {done.out / 'failures.json'} says; the same line tries them again"
        )
    return 1 if done.failures else 0


def _endable(out: str, verb: str) -> AbstractContextManager[object]:
    """SIGTERM and Ctrl-C end a verb that leaves nothing half done, wherever it is, with a sentence.

    What it writes gets its name when it is whole, and the same line goes on, or begins again.
    """
    from jaxhisto.pretrain.stopping import stop_requests

    return stop_requests(out, at_once=True, verb=verb, fact="stopped")


VERBS: tuple[Callable[[Sequence[str]], int], ...] = (
    embed,
    probe,
    finetune,
    classify,
    segment,
    predict,
    cluster,
    retrieve,
    sheet,
    study,
)
