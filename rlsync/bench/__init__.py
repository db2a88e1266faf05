"""``rlsync bench``: its processes, what they measure, and what comes out. No sync uses any of it."""
