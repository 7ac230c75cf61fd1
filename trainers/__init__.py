"""Semi-supervised trainers for nnU-Net, one file per method."""

from nnunet_ssl.trainers.SSLTrainer import SSLTrainer
from nnunet_ssl.trainers.SSLTrainerBCP import SSLTrainerBCP
from nnunet_ssl.trainers.SSLTrainerFixMatch import SSLTrainerFixMatch
from nnunet_ssl.trainers.SSLTrainerM3HL import SSLTrainerM3HL
from nnunet_ssl.trainers.SSLTrainerMeanTeacher import SSLTrainerMeanTeacher
from nnunet_ssl.trainers.SSLTrainerSupervised import SSLTrainerSupervised

__all__ = [
    "SSLTrainer",
    "SSLTrainerBCP",
    "SSLTrainerFixMatch",
    "SSLTrainerM3HL",
    "SSLTrainerMeanTeacher",
    "SSLTrainerSupervised",
]
