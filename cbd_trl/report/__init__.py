"""Measure what a chain is worth: a sweep over sizes and operators, and its page, pictures and tables."""
