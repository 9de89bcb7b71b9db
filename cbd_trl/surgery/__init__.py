"""Surgery on weights: pure functions from state dicts to state dicts.

Weights are `{key: tensor}` with exactly the keys of `Architecture.tensors`: those of the model's state dict, a tied
head left out and fused tensors split into their parts. Nothing is changed in place.
"""
