"""Handles of engines: what an actor rank holds to drive an engine that runs elsewhere."""
