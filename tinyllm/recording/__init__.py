"""Recordings of an engine's steps: written while it runs, repeated bit for bit, or drawn as a page."""
