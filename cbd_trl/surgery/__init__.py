"""Surgery on weights: pure functions from state dicts to state dicts.

Weights are `{key: tensor}` with exactly the keys of `Architecture.tensors` (a tied head left out), as the model
computes with them (see `weights`). Nothing is changed in place.
"""
