"""Heads without layers: they guess from the target's last hidden state, and from the tokens that follow it."""
