"""What a run will hold, fetch and take, before it starts."""
