"""Weights in few bits: how stored tensors fold into one weight, and how they are made and unfolded."""
