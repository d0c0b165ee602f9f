"""What a round is trained on: one device in plain PyTorch, or several of a site through Lightning."""
