"""The types of the public API: errors, results and options."""
