"""Text on a screen: what is printed, repainted and read. Sees an engine only as bursts of text and their cost."""
