"""How to compress a published model: one TOML file each, the typed loader, and what it will take."""
