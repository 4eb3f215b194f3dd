"""A causal language model that takes trees: attention, caches, batch-invariant linears. Knows no drafter."""
