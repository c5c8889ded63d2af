"""The caller's arrays: operands, results, and copies from and to devices."""
