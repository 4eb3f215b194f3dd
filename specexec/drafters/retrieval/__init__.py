"""Earlier texts, found by their endings: what the ngram drafter guesses from. Knows token ids, no model, no file."""
