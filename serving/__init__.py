"""Answers: one base model in memory, every adapter of it mixed in one batch, behind OpenAI's HTTP routes."""
