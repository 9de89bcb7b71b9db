"""Shapes of models between two others, and how many parameters they have. Nothing here reads a weight."""
