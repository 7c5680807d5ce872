"""The published benchmark: stent beside the floors of the same machine and server."""
