"""Pure loss functions: tensors in, tensors out; no trainer, no model."""
