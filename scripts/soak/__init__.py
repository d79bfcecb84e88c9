"""Parts of serve_soak.py: clients of every kind for a server, and the server as a child process."""
