"""What is done everywhere, in one place each: loading a model safely, rows of datasets as tokens, blocks of tokens."""
