"""`python -m jaxhisto VERB`: the command line, where no `jaxhisto` is on the path."""

import sys

from jaxhisto.cli import main

if __name__ == "__main__":
    sys.exit(main())
