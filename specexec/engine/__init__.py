"""The loop, the texts that are in it, and the engine that callers talk to."""
