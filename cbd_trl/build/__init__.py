"""Building a chain: from a source and the anchors requested to their folders, one training after another.

`build` is the way through; `plan` decides what is built, `resume` what is already there.
"""
