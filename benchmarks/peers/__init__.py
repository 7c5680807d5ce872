"""Other engines and queues beside stent: the same work, the same server, one call."""
