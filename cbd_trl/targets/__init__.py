"""Make a model from a chain: `request` finds the target, `operators` make its weights, `saving` writes it.

`from_chain` makes one target and `many` several; `calibrate` chooses how to interpolate by measured loss.
"""
