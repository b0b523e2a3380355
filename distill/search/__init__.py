"""Searches without training: candidates, their fitness, the loop and its report."""
