"""Runs things: the command line, a local Ray, job submission, deployment. Nothing here imports ray until a command needs it."""
