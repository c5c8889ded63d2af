"""Admission control: memory, the queue, and the turns of tenants."""
