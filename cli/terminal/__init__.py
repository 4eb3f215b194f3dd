"""Text on a screen: what is printed, painted over and read. Knows no engine's insides."""
