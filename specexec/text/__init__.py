"""Between text and tokens: what a prompt becomes, what an answer says, and how model families write it."""
