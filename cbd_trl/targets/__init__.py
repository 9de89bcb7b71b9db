"""Models made from a chain: the target requested, the operators that interpolate its weights, and saving it."""
