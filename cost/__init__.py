"""What a configuration costs before anybody pays for a GPU: behind explain.py, which is the command."""
