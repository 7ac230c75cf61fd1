"""What nnU-Net's finder reads when `nnUNet_extTrainer` points at this folder.

nnU-Net imports this file under its bare name and forgets it again, so the classes live in
`nnunet_ssl.trainers`, an ordinary module. Names with settings, `SSLTrainer+num_epochs=100`,
are made on request.
"""

from nnunet_ssl.naming import variants
from nnunet_ssl.trainers import *  # noqa: F403

__getattr__ = variants("nnunet_ssl.trainers")
