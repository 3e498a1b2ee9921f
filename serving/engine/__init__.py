"""The engine: one thread that owns every model; it generates in one batch, classifies, and takes turns with models of their own. Knows no
HTTP and no Ray."""
