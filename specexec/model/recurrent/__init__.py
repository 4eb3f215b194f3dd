"""Layers that carry a state from token to token, as trees need them: a vector per node, a state for the text alone."""
