"""OpenAI's API in words: requests read and checked, answers shaped. Knows no server; batch files use it too."""
