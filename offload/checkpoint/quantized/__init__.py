"""Quantised weights: how stored tensors form one weight, how they are made and dequantised. Knows no layer."""
