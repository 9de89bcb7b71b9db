"""Model cards: the template, the metadata in front of it, where a model comes from, and cards that people may edit."""
