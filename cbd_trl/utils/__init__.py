"""What is done everywhere, in one place each: safe model loading, rows as tokens, blocks of tokens."""
