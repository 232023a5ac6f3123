"""`python -m jaxhisto.member VERB ...`: the child of a supervisor, one process of a pod.

Joins the others, then does what the command line says. Not meant to be typed.
"""

from __future__ import annotations

import os
import sys
import time

from jaxhisto import cli
from jaxhisto.distributed import join, leave
from jaxhisto.launch import MEMBER, inherited
from jaxhisto.supervise import STOPPED, end_with_the_parent

LINGER_S = 3.0


def main() -> int:
    """The exit code of the verb."""
    launch = inherited(os.environ)
    if launch is None:
        print(f"{MEMBER} is not set; this is started by `jaxhisto` itself.", file=sys.stderr)
        return 2
    end_with_the_parent(launch.parent)
    join(launch)
    code = cli.main(sys.argv[1:])
    if code in (0, STOPPED):
        leave()
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    if launch.process == 0:
        # With it goes the coordination service, which ends the others in the middle of a word.
        time.sleep(LINGER_S)
    # Not by way of JAX's own end, which waits for processes that may be gone.
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
