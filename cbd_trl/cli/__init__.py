"""The command `cbd-trl`: `main` picks the command; each has a file with its arguments and what it prints."""
