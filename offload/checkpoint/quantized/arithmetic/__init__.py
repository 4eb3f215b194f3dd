"""Codes become values: arithmetic on tensors. Knows no file, no tensor's name and no config."""
