"""Ollama's /api/chat and /api/generate as data: a body becomes a chat request, its answer lines of JSON."""
