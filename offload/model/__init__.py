"""A transformers model whose layers arrive when they are needed. Knows no tree, no token and no sampler."""
