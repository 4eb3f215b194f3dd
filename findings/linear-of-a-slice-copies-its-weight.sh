#!/usr/bin/env bash
# torch 2.13.0: a linear over some rows of a batch of one, x[:, :64] of [1, 600, I], is a batched product that copies
# the whole weight first, although the slice says that it is contiguous.
#
# The stride of a dimension of size 1 says nothing about the numbers, and is_contiguous() leaves it out; so does
# clone(), which keeps it. linear() does look at it: where it is that of the 600 rows, the rows are not folded into one
# matrix. It then expands the weight, copies it and calls bmm, instead of one mm over the weight as it lies. The numbers
# are the same. In bf16 on CPUs with instructions for it that took 6 to 30 times as long with 64 rows and a weight of
# 2048 x 2048 (on AMX 30 ms instead of 1.1). x[0, :64].unsqueeze(0) and reshape(-1, I) have no such stride.
#
# Seen with torch 2.13.0 on a CPU. Operators are compared, no times: those are printed.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import time

import torch
from torch.nn.functional import linear
from torch.profiler import profile

torch.set_num_threads(1)
batch, weight = torch.randn(1, 600, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
rows = batch[:, :64]
ways = {"x[:, :64]": rows, "its clone()": rows.clone(), "x[0, :64].unsqueeze(0)": batch[0, :64].unsqueeze(0)}
called, found = {}, {}
for name, given in ways.items():
    with profile() as seen:
        found[name] = linear(given, weight)
    called[name] = {event.key for event in seen.key_averages()} & {"aten::mm", "aten::bmm", "aten::clone"}
    best = 1.0
    for _ in range(5):
        began = time.perf_counter()
        linear(given, weight)
        best = min(best, time.perf_counter() - began)
    print(f"{name}: contiguous {given.is_contiguous()}, strides {given.stride()}, {sorted(called[name])}, {best * 1e3:.1f} ms")
assert all(given.is_contiguous() for given in ways.values())
assert called["x[:, :64]"] == called["its clone()"] == {"aten::bmm", "aten::clone"}, called
assert called["x[0, :64].unsqueeze(0)"] == {"aten::mm"}, called
assert torch.equal(found["x[:, :64]"], found["x[0, :64].unsqueeze(0)"])
PY
