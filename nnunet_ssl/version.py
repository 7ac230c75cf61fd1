"""The version, and the nnU-Net versions it was tried on."""

__version__ = "0.1.0"
NNUNET_MIN = (2, 8, 1)
NNUNET_BELOW = (2, 9)
