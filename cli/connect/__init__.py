"""A running server of ours in place of an engine: its models over HTTP. Loads nothing and imports no torch."""
