"""The demo: the recipe `demo` with a real 135M language model, and what it prints.

`source` fetches the model, `run` builds, measures and reports.
"""
