"""Make a model from a chain: `request` finds the target, `operators` make its weights, `saving` writes it.

`from_chain` makes one target and `many` several; `shape_search` compares shapes of one size; `calibrate` chooses how
to interpolate by measured loss.
"""
