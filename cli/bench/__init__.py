"""Commands that measure and compare: bench, check, eval."""
