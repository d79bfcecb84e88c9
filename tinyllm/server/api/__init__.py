"""The HTTP API: OpenAI's endpoints, and a few beside them."""
