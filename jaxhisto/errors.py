"""The errors a user sees: one sentence each, with file, fact and remedy.

Everything raised on purpose derives from `JaxhistoError`; the command line prints its
message as one line on stderr and exits with `exit_code`. The traceback is shown with
`--debug` alone.
"""


class JaxhistoError(Exception):
    """A failure the user can act on; the message is one sentence: file, fact, remedy."""

    exit_code = 1


class ConfigError(JaxhistoError):
    """A setting or flag that does not exist, does not parse or contradicts another one."""

    exit_code = 2


class SlideError(JaxhistoError):
    """A slide that cannot be opened, has no pixel size, or yields no tile."""


class StoreError(JaxhistoError):
    """A tile store or image folder that is missing, empty, damaged or not what it says."""


class RunError(JaxhistoError):
    """A training run that cannot start, resume or go on."""


class ExportError(JaxhistoError):
    """A run or weights file that cannot be turned into the layout asked for."""
