"""A causal language model that takes trees: attention, caches, and linears whose rows do not depend on one another."""
