"""Ctrl-C and kill in the middle of a sweep: gone within seconds, nothing hangs, nothing is left behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import tiny

SLOW_SWEEPS = """
import sys
from cli.engine.imports import lean_imports
with lean_imports():
    import torch, offload, offload.model.load
torch.set_num_threads(1)
model = offload.load(sys.argv[1], "disk", link_limit_Bps=float(sys.argv[2]))
print("ready", flush=True)
with torch.no_grad():
    while True:
        model(torch.arange(5)[None])
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_sweep_ends_the_process(stop: signal.Signals, tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    # At 2 kB/s one layer of 123 kB takes a minute: the signal falls into the wait for it.
    command = [sys.executable, "-c", SLOW_SWEEPS, str(tmp_path), "2e3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        sent_s = time.monotonic()
        process.send_signal(stop)
        process.wait(timeout=20)
        assert time.monotonic() - sent_s < 15
        # Libraries that run code at Python's end hide from the shell that it was Ctrl-C.
        assert process.returncode in (-stop, 1)
