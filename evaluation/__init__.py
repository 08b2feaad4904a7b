"""From a trained policy to a score: the encoder with its memory, the tasks' protocols, the metrics."""
