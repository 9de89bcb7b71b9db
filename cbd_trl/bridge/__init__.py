"""Across vocabularies: what tokens of two tokenizers have in common, down to their bytes."""
