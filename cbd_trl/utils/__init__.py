"""What is done everywhere, in one place each: loading a model safely, rows of data sets as tokens, blocks."""
