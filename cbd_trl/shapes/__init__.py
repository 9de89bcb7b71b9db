"""Shapes of models between two others, and how many parameters they have. Nothing here reads a weight.

`solve` goes from a size to config fields, `cut` from config fields to an architecture cut from a larger one, and
`depths` knows which depths whole blocks can give.
"""
