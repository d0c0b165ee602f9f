"""The devices of a site: one in plain PyTorch, or several through Lightning."""
