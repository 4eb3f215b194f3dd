"""Checkpoints laid out for streaming, written once."""
