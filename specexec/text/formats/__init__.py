"""How model families write thoughts and tool calls, and how an answer is read back."""
