"""Who may run: the memory, the queue and the turns of tenants."""
