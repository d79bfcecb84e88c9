"""An OpenAI-compatible server over one LLM: `python -m tinyllm serve`. It needs the extra `serve`."""
