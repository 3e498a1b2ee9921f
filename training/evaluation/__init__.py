"""How good a trained model is, beside its base: on the validation rows of its run, or on any rows (`hone evaluate`)."""
