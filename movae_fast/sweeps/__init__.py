"""Search over flags by many training runs; the published sweeps are the YAML files here."""
