"""Trainers: one config file and one trainer file per method, wiring only.

From arguments to a loss: `distill_config` holds the arguments, `distill_trainer` reads top to bottom, `model_setup`
loads and checks student and teacher, `data` the rows, and `step_loss` computes inside the student's forward. The
`bridge_*` modules are the same for a teacher with tokens of its own.
"""
