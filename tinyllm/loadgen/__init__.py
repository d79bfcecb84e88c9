"""A load generator for OpenAI-compatible servers. It speaks HTTP alone and knows nothing of the engine."""
