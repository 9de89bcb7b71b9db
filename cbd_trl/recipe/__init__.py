"""A whole chain as one YAML file: its schema, its data, its cost, the check before any work, and the build."""
