"""Surgery on weights: pure functions from state dicts to state dicts.

Weights are `{key: tensor}` with exactly the keys of `Architecture.tensors` (a tied head left out), as the model
computes with them (see `weights`). Nothing is changed in place. `reorder` and `grow` are exact, as is `norms`;
`least_squares` cuts by the moments of `statistics` (kept by `statistics_file`) and `refit` fits a cut model to the
whole one; `blocks` and `block_search` choose layers; `align` matches two models that were trained apart.
"""
