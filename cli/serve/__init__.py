"""The engine behind HTTP, in several protocols. Needs the extra `specexec[serve]`; knows no tensor and no placement."""
