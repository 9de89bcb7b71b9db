"""Pure loss functions: tensors in, tensors out; no trainer, no model.

`divergences` compares next-token distributions, `teacher_outputs` holds what a teacher computed, `objective` adds up
the terms, `fused` computes them without holding all logits, `hidden` compares hidden states, `reduction` has the one
rule for shifting, masking and normalizing, and `held_out` measures a model on fixed text.
"""
