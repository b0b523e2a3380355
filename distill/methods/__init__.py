"""The published methods, each family in a folder of its own."""
