"""OpenAI's API as data: requests read and checked, answers shaped. Other protocols build on it; knows no server."""
