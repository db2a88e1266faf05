"""vLLM: the plug-in and receiver inside its workers, and a handle that owns an engine. The only unit that imports vLLM."""
