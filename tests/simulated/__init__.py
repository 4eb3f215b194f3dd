"""A device that exists in Python alone, whose every access to memory is checked for order."""
