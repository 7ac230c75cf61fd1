"""Semi-supervised trainers for nnU-Net, one file per method."""

from nnunet_ssl.trainers.SSLTrainer import SSLTrainer
from nnunet_ssl.trainers.SSLTrainerBCP import SSLTrainerBCP
from nnunet_ssl.trainers.SSLTrainerC3S3 import SSLTrainerC3S3
from nnunet_ssl.trainers.SSLTrainerCAD import SSLTrainerCAD
from nnunet_ssl.trainers.SSLTrainerCPS import SSLTrainerCPS
from nnunet_ssl.trainers.SSLTrainerDiffCL import SSLTrainerDiffCL
from nnunet_ssl.trainers.SSLTrainerERSR import SSLTrainerERSR
from nnunet_ssl.trainers.SSLTrainerFixMatch import SSLTrainerFixMatch
from nnunet_ssl.trainers.SSLTrainerM3HL import SSLTrainerM3HL
from nnunet_ssl.trainers.SSLTrainerMeanTeacher import SSLTrainerMeanTeacher
from nnunet_ssl.trainers.SSLTrainerMEDL import SSLTrainerMEDL
from nnunet_ssl.trainers.SSLTrainerMN import SSLTrainerMN
from nnunet_ssl.trainers.SSLTrainerSPCL import SSLTrainerSPCL, SSLTrainerSPCLPretrain
from nnunet_ssl.trainers.SSLTrainerSupervised import SSLTrainerSupervised
from nnunet_ssl.trainers.SSLTrainerTransMedSeg import SSLTrainerTransMedSeg
from nnunet_ssl.trainers.SSLTrainerUAMT import SSLTrainerUAMT
from nnunet_ssl.trainers.SSLTrainerUniMatch import SSLTrainerUniMatch

__all__ = [
    "SSLTrainer",
    "SSLTrainerBCP",
    "SSLTrainerC3S3",
    "SSLTrainerCAD",
    "SSLTrainerCPS",
    "SSLTrainerDiffCL",
    "SSLTrainerERSR",
    "SSLTrainerFixMatch",
    "SSLTrainerM3HL",
    "SSLTrainerMEDL",
    "SSLTrainerMN",
    "SSLTrainerMeanTeacher",
    "SSLTrainerSPCL",
    "SSLTrainerSPCLPretrain",
    "SSLTrainerSupervised",
    "SSLTrainerTransMedSeg",
    "SSLTrainerUAMT",
    "SSLTrainerUniMatch",
]
