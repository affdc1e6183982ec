"""Low-rank adapters: at any linear site of any model, composed, chosen from banks, learned online."""
