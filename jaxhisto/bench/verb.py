"""What `jaxhisto bench` does, and `python -m jaxhisto.bench` where tyro is not installed."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from shlex import quote

from jaxhisto.bench_config import BenchConfig
from jaxhisto.console import say, say_next


def bench(config: BenchConfig, line: str = "jaxhisto bench") -> int:
    """Measures, or writes the report of records; 0. `line` is how it was called, for the next one.

    Raises:
      JaxhistoError: as `run_bench` and `write_report`.
    """
    if config.report:
        from jaxhisto.bench.report import write_report

        say(f"wrote {write_report(config.report, config.out or 'benchmarks.md')}")
        return 0
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it ends its children
    path = measured(config)
    say(f"wrote {path}")
    say_next(f"{line} --report {quote(str(path))} --out benchmarks.md")
    return 0


def measured(config: BenchConfig) -> Path:
    """The record of what the settings ask for: a recipe's cost, growth, variants, or the stages."""
    if config.recipe:
        from jaxhisto.bench.projects import run_cost

        return run_cost(config)
    if config.growth:
        from jaxhisto.bench.projects import run_growth

        return run_growth(config)
    if config.variants:
        from jaxhisto.bench.projects import run_variants

        return run_variants(config)
    from jaxhisto.bench.run import run_bench

    return run_bench(config)
