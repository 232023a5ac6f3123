"""Requests to stop: the first is kept, its echo is none, a second one ends the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, time
from jaxhisto.pretrain.stopping import stop_requests
with stop_requests("RUN") as stop:
    with stop.first_step(True):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    sys.exit(10 + stop.is_set())
"""


@pytest.mark.parametrize(("apart", "code"), [(0.01, 11), (1.1, 143)])
def test_only_a_second_request_ends_the_process_not_an_echo_of_the_first(apart, code):
    ended = subprocess.run([sys.executable, "-c", PROGRAM, str(apart)])
    assert ended.returncode == code
