"""Batch work: many prompts in, one record each out, and nothing finished ever lost."""
