"""NCT: controls learnt for a frozen one-step generator."""
