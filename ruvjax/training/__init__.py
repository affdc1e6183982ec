"""Training: objectives come in as functions, so nothing here knows which model or loss it optimises."""
