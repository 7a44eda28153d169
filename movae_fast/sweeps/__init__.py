"""Search over flags with many training runs; the YAML files in this folder are the published sweeps."""
