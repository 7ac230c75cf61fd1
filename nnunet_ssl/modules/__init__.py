"""Parts of methods that learn or remember; their state goes into the checkpoint."""

from nnunet_ssl.modules.brake import ClassBrake, class_shares
from nnunet_ssl.modules.thresholds import ClassThresholds

__all__ = ["ClassBrake", "ClassThresholds", "class_shares"]
