"""How a token is chosen: noise, filters, penalties, grammars, and the walk that verifies a tree. Knows no model."""
