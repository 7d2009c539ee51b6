"""What a run needs on given machines: memory, traffic, time."""
