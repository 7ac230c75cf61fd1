"""Semi-supervised trainers, one file per method."""
