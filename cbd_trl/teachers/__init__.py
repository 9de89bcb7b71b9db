"""Where the teacher's logits come from."""
