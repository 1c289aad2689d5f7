"""Output formats: the bits of their files and how a matrix is stored in them."""
