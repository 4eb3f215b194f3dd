"""Words, files and screens: the commands people type."""
