"""One file a paper; the list of them is distill/catalog.py."""
