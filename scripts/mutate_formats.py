"""Damage the files of every format that is read, at random: each is refused by a documented error, or adds up.

python scripts/mutate_formats.py [--count 100000] [--seed 0] [--only FORMAT]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.mutations import FAULT, run


def main() -> int:
    """Print what came of how many; 1 where anything but a documented error did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    asked = parser.parse_args()
    began_s, faults = time.monotonic(), 0
    at = Path(tempfile.mkdtemp(prefix="mutations-"))
    os.environ["SPECEXEC_HOME"] = str(at / "home")
    for name, outcome in run(at, asked.count, asked.seed, asked.only):
        told = ", ".join(f"{what} {count}" for what, count in outcome.most_common())
        print(f"{name:20} {outcome.total():7} {told}", flush=True)
        faults += sum(count for what, count in outcome.items() if what.startswith(FAULT))
    print(f"{faults} faults, {time.monotonic() - began_s:.0f} s; files in {at}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
