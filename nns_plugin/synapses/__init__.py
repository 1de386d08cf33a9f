"""Single weights: masks, significance, and the minimal network."""
