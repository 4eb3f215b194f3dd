"""Heads: layers trained to guess from what the target has just computed. They read its hidden states."""
