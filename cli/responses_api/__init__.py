"""OpenAI's Responses as data: a body becomes a chat request, its answer output items. Knows no server."""
