"""Models: base models, archives, training of one round, losses and text generation.

Importing this package is cheap. Its modules need torch; those of `archive` need nothing beyond torch.
"""
