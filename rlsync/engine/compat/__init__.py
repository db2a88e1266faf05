"""Every place where vLLM's versions or platforms differ, and every private name of vLLM that is used.

Written against vLLM 0.25.1 and 0.32.0. A branch names the version it is for; it can go with the last supported version before that.
"""
