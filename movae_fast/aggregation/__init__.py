"""Aggregators: from a Jacobian's rows to one update."""
