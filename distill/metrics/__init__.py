"""Distances between sets of pictures, and the protocol that every number carries."""
