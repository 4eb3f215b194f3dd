"""The algorithm: trees of guesses, verified by one sweep of any causal language model."""
