"""What every command needs: options, settings, errors and quantities as people write them."""
