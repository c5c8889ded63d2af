"""What ``gradwire check`` asks of a server, and what right answers are."""
