"""Self-contained pages to look at."""
