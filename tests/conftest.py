"""Tests compare floats between runs: one thread makes every run take the same order, and keeps busy machines fair."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

torch.set_num_threads(1)
