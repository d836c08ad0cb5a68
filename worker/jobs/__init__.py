"""Jobs: from a delivery to its settling."""
