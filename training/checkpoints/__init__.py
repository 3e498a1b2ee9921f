"""State to resume from: what trains and what the optimiser knows of it, in files that any number of workers can read."""
