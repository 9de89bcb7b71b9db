"""A whole chain as one YAML file.

`schema` reads and validates it, `check` finds everything that is wrong before any work, `estimate` predicts disk and
time, `memory` the memory of each phase (counted by `trace`), `run` builds and measures the chain. `shipped/` has the
recipes that come with the package, `corpus` reads its text.
"""
