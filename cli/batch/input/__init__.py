"""Files, lines and standard input become items. Knows no engine and no output."""
