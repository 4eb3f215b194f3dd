"""The engine behind HTTP, with OpenAI's API. Needs the extra `specexec[serve]`; knows no tensor and no placement."""
