"""Checks that a streamed answer of the demo read exactly its layers' bytes, once per sweep.

Takes a record of `specexec generate --json --offload disk` on standard input. The bytes of a layer come from the
checkpoint's own header, not from the code under test.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

CHECKPOINT = Path(__file__).parents[1] / "offload" / "demo" / "target" / "model.safetensors"


def layer_bytes(checkpoint: Path) -> int:
    """Bytes of all decoder layers together: what one sweep has to bring in."""
    with checkpoint.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    spans = [entry["data_offsets"] for name, entry in header.items() if name.startswith("model.layers.")]
    return sum(end - start for start, end in spans)


def main() -> str | None:
    """None if the numbers agree, else what is wrong."""
    record = json.loads(sys.stdin.readline())
    tokens, sweeps, read = record["usage"]["completion_tokens"], record["sweeps"], record["bytes_read"]
    per_sweep = layer_bytes(CHECKPOINT)
    print(f"{tokens} tokens in {sweeps} sweeps; {read:,} bytes read = {sweeps} x {per_sweep:,}")
    if read != sweeps * per_sweep:
        return f"bytes read do not match the sweeps: {read:,}, expected {sweeps * per_sweep:,}"
    if tokens <= sweeps:
        return f"no guess was ever accepted: {tokens} tokens took {sweeps} sweeps"
    return None


if __name__ == "__main__":
    sys.exit(main())
