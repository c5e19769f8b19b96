"""Side by side with peers: one process, alternating repeats, medians."""
