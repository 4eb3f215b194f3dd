"""Floats of 4 and 8 bits as float32. Knows no format."""

import torch

# E2M1, the four bits of FP4: two to the byte, the low half first.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def numbers(stored: torch.Tensor) -> torch.Tensor:
    """Scales as float32: floats of any width; bytes are exponents (E8M0), 127 for one."""
    if stored.dtype == torch.uint8:
        stored = stored.view(torch.float8_e8m0fnu)
    return stored.float()
