"""Mathematics of each recurrence and of its fused neighbours: one function, one signature, several backends."""
