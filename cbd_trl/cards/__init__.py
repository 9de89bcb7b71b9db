"""Model cards: the template, the metadata in front of it, where a model comes from, and files that people may edit."""
