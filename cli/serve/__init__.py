"""The engine behind HTTP, in the words of several protocols. Needs the extra `specexec[serve]`; knows no tensor and no placement."""
