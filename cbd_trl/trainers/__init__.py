"""Trainers: one config file and one trainer file per method, wiring only."""
