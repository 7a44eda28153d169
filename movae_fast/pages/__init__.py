"""Make web pages of runs: a report as one HTML file, and an interactive page of a model."""
