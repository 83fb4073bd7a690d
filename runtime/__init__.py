"""What keeps a run alive: ranks that start, agree and fail together; stops; what is told; the run directory."""
