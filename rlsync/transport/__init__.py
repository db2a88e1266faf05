"""Ways to make bytes of one process readable in another."""
