"""The ground floor: errors, frozen configuration, TOML, whole files, canonical JSON. Imports no torch."""
