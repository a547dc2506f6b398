"""How what was chosen leaves: zeroed by a mask, or physically cut out."""
