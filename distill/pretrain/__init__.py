"""How the embedded teachers and scorers were trained."""
