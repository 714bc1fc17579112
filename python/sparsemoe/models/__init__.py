"""Models: one folder a system, each a config dataclass and the model, made of nn parts."""
