"""A transformers model whose layers arrive when they are needed."""
