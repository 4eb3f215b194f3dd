"""Anthropic's Messages as data: a body becomes a chat request, its answer content blocks. Knows no server."""
