"""From options to a running engine, and what is kept of it from run to run. Knows no command."""
