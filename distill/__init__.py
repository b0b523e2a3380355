"""The code of fewstep, in rooms by subject: each imports what lies on lower floors (pyproject.toml holds them)."""
