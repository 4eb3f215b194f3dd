#!/usr/bin/env bash
# torch 2.13.0 on x86-64: oneDNN's linear, which torch.compile takes for float32 on a CPU once weights are frozen,
# compiles anew for every number of rows, and about 0.3 MB of each stay until the process ends.
#
# One shape of weights, 127 numbers of rows, the outputs freed at once: some 70 MB of memory are gone. oneDNN's cache of
# primitives (1024 of them, ONEDNN_PRIMITIVE_CACHE_CAPACITY) explains half; without it (0) the other half still stays, and
# malloc_trim brings none of it back. torch.nn.functional.linear, which is MKL's, keeps next to nothing. A server whose
# batches have any number of rows grows so by hundreds of megabytes, which look like a leak and end where all were seen.
#
# Seen with torch 2.13.0, two CPUs.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" numpy
cat > "$folder/measure.py" <<'PY'
import ctypes
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
weight, rows = torch.randn(576, 576), torch.randn(256, 576)


def product(count):
    if sys.argv[1] == "onednn":
        return torch.ops.mkldnn._linear_pointwise.default(rows[:count], weight, None, "none", [], "")
    return torch.nn.functional.linear(rows[:count], weight)


def anonymous_kB():
    ctypes.CDLL(None).malloc_trim(0)
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)


product(2), product(256)
before_kB = anonymous_kB()
for count in range(3, 257, 2):
    assert torch.allclose(product(count), rows[:count] @ weight.t(), atol=1e-3)
print((anonymous_kB() - before_kB) // 127)
PY
run() { "$folder/venv/bin/python" "$folder/measure.py" "$1"; }
held=$(run onednn)
uncached=$(ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 run onednn)
plain=$(run mkl)
echo "kB held for a number of rows: oneDNN $held, without its cache $uncached, torch.nn.functional.linear $plain"
[ "$held" -gt 300 ] && [ "$uncached" -gt 150 ] && [ "$plain" -lt 60 ]
