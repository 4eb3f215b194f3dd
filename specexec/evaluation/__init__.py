"""Whether the text is the target's own, and other verification rules to compare with. Only `cli/bench` uses it."""
