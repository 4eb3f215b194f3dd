"""Where guesses come from: one file per drafter, and what they share. Knows neither planner nor loop."""
