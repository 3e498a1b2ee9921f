"""The engine: one thread that owns the model, with generation and classification as its two kinds of work. Knows no HTTP and no Ray."""
