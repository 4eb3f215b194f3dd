"""Kills at random moments, torn tails included, lose nothing: the quick version of scripts/torture_batch.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "torture_batch.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_end_like_undisturbed_ones() -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "25", "--items", "15"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (counts := re.match(r"25 kills, (\d+) with a torn tail, (\d+) in mid-answer", ran.stdout))
    assert all(int(count) >= 2 for count in counts.groups()), "or the test proves nothing"
    assert "· 0 not as the undisturbed run" in ran.stdout
