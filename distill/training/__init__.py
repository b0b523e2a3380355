"""The one training loop, what it asks of a method, and what it leaves in a run folder."""
