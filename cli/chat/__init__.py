"""Conversations: the loop, its slash commands, and where they are kept."""
