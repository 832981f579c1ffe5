"""Range objectives: what makes one clipping range better than another."""
