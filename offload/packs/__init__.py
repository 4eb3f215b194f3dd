"""Checkpoints laid out for streaming, written once. Knows files and tensors, computes nothing but quantisation."""
