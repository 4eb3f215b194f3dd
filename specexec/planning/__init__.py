"""Which guesses are worth a place in the tree, and how many of them. Sees drafters as scores and seconds."""
