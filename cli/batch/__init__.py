"""Batch work: many prompts in, one record each out, nothing finished ever lost. Knows requests, no tensor."""
