"""Layers on their way from disk or RAM to where they compute, while others compute."""
