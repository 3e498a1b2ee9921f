"""Makes adapters: data, model, method, loop, search. `python -m training RECIPE` is what a Ray Job runs."""
