"""What a run and a search are configured by: typed sections, and how a tree of YAML becomes them."""
