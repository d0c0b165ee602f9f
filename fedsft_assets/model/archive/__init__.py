"""`.nemo` archives and torch checkpoints, read and written without trust in who made them."""
