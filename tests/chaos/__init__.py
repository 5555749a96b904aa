"""The fault campaign: `python -m tests.chaos` plays runs, each with one to three faults, and judges them.

`program.py` is their main.py, `catalogue.py` the faults, `play.py` one run, `judges.py` what must hold.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
for folder in (str(TESTS), str(TESTS / "e2e")):  # as pytest has them
    if folder not in sys.path:
        sys.path.insert(0, folder)
