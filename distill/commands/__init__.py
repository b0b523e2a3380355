"""What `fewstep VERB` does."""
