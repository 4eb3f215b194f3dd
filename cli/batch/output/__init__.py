"""Answers become lines and files that survive a crash. Knows no engine and no input file."""
