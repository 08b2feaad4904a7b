"""What keeps a run alive: reading data, checkpoints, guards, reports. It knows nothing of GRACE and imports none of it."""
