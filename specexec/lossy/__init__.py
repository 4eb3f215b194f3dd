"""What may change a text, where it was asked for by name. Knows no file, no screen and no engine."""
