"""Make pages of runs for a browser: a report in one file, and a page to look into a model."""
