"""`python -m compress`."""

import os
import sys

# `python -m` puts the current folder in front of all that is imported; what lies there may be a stranger's.
if not sys.flags.safe_path and sys.path and os.path.realpath(sys.path[0] or ".") == os.path.realpath("."):
    del sys.path[0]

from compress.cli import main

main()
