"""matplotlib's Figure, for all studies. Without matplotlib a study ends in one line, status 2."""

import sys
from pathlib import Path

try:
    from matplotlib.figure import Figure  # noqa: F401
except ImportError:
    program = Path(sys.argv[0]).name
    print(f"{program}: error: needs matplotlib (pip install matplotlib)", file=sys.stderr)
    sys.exit(2)
