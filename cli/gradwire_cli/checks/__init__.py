"""The checks of ``gradwire check``, and their reference results."""
