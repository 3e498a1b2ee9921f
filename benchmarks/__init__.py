"""Measurements as ratios in one run, interleaved, several repeats; each result is a JSON in results/."""
