"""Objectives of distillation across vocabularies: one file and one row of `registry.OBJECTIVES` each.

Most compare groups of tokens with the same bytes (`groups.GroupObjective`); `prefix` and `cross_attention` compare
positions. All of them read `inputs.AlignedStates` of both models and never hold more than one chunk of logits.
"""
