"""One model, whatever its role: loading it by name, knowing which one it is, what wraps it."""
