"""Lets the tests import the modules of the folder above and of studies/."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
