"""A complete small method to copy: what each file of a method holds. The catalog does not list it."""
