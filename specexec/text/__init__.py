"""Between text and tokens: what a prompt becomes, what an answer says. Knows tokenizers and templates, no weights."""
