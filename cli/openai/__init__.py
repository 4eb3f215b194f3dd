"""OpenAI's API as data: requests read and checked, answers shaped. Knows no server; batch files use it too."""
