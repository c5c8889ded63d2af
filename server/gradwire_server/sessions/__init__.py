"""Sessions: tensors that stay on the server between calls."""
