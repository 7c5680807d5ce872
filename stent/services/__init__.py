"""What a worker does, one responsibility a module."""
