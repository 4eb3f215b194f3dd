"""Files, lines and standard input become items."""
