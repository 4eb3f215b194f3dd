"""Drafters trained on what a target wrote: its texts recorded, heads and small models learned from them. No screen."""
