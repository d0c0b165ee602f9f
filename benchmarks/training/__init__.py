"""Training beside a plain loop, the Hugging Face Trainer and TRL's SFTTrainer."""
