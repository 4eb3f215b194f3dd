"""Linears that give a row the same bits whatever rows are computed with it, each in the quick way of some machines."""
