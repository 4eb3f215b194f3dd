"""The engine behind HTTP, in the words of the OpenAI API. Needs the extra `specexec[serve]`."""
