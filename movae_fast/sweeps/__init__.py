"""Studies: many training runs that search over flags; the published ones are the YAML files here."""
