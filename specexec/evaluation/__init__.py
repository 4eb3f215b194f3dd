"""Whether the text is the target's own, and other verification rules to compare with. Nothing that writes text for users imports it."""
