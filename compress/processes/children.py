"""The one way in which this program starts another Python."""

from __future__ import annotations

import sys


def python(*words: str) -> list[str]:
    """The command line of this interpreter with ``words`` behind it, such as ``-m compress`` or a script.

    With -P neither the current folder nor the script's own is put in front of what is imported: a file ``numpy.py``
    that lies where the user happens to stand, in a folder that was fetched, is not run. What it prints is UTF-8,
    whatever the system's own encoding is.
    """
    return [sys.executable, "-P", "-X", "utf8", *words]
