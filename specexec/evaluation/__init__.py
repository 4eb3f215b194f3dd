"""Whether the text is the target's own, and other ways to verify that it is compared with."""
