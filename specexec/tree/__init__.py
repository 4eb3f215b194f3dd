"""The tree of guessed tokens, while it grows and when it is submitted. Knows no model and no device."""
