"""Structured output through llguidance: from a description of a text to the tokens that may come next."""
