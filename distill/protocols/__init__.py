"""Published protocols by name, their files, and the numbers that they reproduce."""
