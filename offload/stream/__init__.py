"""Layers on their way from disk or RAM to where they compute. Knows bytes and buffers, no modelling code."""
