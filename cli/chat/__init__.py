"""Conversations: the loop, its slash commands, and where they are kept. Knows no placement and no sampler."""
