"""Documents, and the tokens of them that every method reads alike."""
