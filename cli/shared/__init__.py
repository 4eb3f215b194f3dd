"""What every command needs: options, settings, errors, quantities. Knows no command and no engine that runs."""
