"""Surgery on weights: pure functions from state dicts to state dicts.

Weights are `{key: tensor}` with exactly the keys of `Architecture.tensors` (a tied head left out), as the model
computes with them (see `weights`). Nothing is changed in place.

Exact, with equal logits: `reorder` (permute, sort by importance, rotate), `grow` (wider, deeper) and `norms` (move
gains into the layers that read them). Approximate: `least_squares` cuts widths by the moments of `statistics`, which
`statistics_file` keeps on disk, and `refit` fits a cut model to the whole one. `blocks` chooses layers by even
spacing, `block_search` by measured cost; `align` matches two models that were trained apart.
"""
