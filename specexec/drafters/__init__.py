"""Where guesses come from: one file for each drafter, its line in the registry, and what they share."""
