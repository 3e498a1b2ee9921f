"""What a model is tuned to do and how: tasks and methods as torch, transformers and PEFT do them. The storey between the floor and the
rooms: training and serving both stand on it, so that what is served is computed as it was trained. No Ray, no DeepSpeed, no HTTP."""
