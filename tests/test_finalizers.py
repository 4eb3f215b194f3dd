"""What is still open at Python's end is closed, whatever finalizers other libraries had before."""

import subprocess
import sys

SCRIPT = """
import weakref
from offload.machine.finalizers import close_when_collected

class Owner: pass

other, owner, collected = Owner(), Owner(), Owner()
weakref.finalize(other, int)  # as torch has some
close_when_collected(owner, lambda: print("closed at the end"))
close_when_collected(collected, lambda: print("closed when collected"))
del collected
"""


def test_what_is_open_at_the_end_is_closed_once() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["closed when collected", "closed at the end"]
