"""Objectives of distillation across vocabularies: one file each, and their table in `registry`."""
