"""The command line: commands, files, screens, the server. Reaches models through engines alone."""
