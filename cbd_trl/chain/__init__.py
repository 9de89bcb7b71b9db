"""Chains: the manifest on disk, the shapes between two anchors, building one and making models from it."""
