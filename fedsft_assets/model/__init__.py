"""The NeMo model: base models, batches, training of one round, losses and answers.

Importing this package imports nothing heavy; its modules need torch, and those of `archive` no
more than torch.
"""
