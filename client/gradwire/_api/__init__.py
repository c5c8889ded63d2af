"""What callers see and say: errors, results, options."""
