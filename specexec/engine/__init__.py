"""The loop, the texts being written, and the engine that callers use. Knows no file, no placement and no screen."""
