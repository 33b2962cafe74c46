"""Target devices: one TOML file each, and the typed loader."""
