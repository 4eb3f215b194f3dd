"""Answers become lines and files that survive a crash."""
