"""What a verb says, and to whom."""

from __future__ import annotations

import subprocess
import sys

from jaxhisto.console import counted

TALKS = """
import sys
from jaxhisto.console import say
for _ in range(20000):
    say("line")
print("end", file=sys.stderr)
"""


def test_work_goes_on_where_nobody_reads_any_more():
    """As in `jaxhisto pretrain ... | head -1`."""
    work = subprocess.Popen(
        [sys.executable, "-c", TALKS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert work.stdout
    assert work.stdout.readline() == "line\n"
    work.stdout.close()
    assert work.stderr
    assert work.stderr.read() == "end\n"
    assert work.wait(30) == 0
    work.stderr.close()


def test_one_is_not_many():
    assert [counted(n, "slide") for n in (0, 1, 2000)] == ["0 slides", "1 slide", "2,000 slides"]
