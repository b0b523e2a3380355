"""The embedded teachers."""
