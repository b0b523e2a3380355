"""The list of methods and searches, and what needs it: configurations read, checked and completed."""
