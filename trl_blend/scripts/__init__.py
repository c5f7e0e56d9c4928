"""What the training scripts of `examples/` share, and what the command line needs to run them."""
