"""What is done everywhere, in one place each: loading a model safely, rows as tokens, blocks of tokens."""
