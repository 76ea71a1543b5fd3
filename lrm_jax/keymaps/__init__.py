"""Tables that translate PyTorch checkpoints to our parameters and back."""
