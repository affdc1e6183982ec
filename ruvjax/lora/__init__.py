"""Low-rank adapters: learned online, kept from forgetting."""
