"""Self-training: label scans without masks, choose the stable ones, train on them."""
