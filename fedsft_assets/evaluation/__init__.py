"""What trained models are worth, side by side."""
