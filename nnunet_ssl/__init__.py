"""Semi-supervised segmentation for nnU-Net v2."""
