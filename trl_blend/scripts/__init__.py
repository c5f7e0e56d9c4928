"""What the training commands run, shared by the scripts of `examples/`."""
