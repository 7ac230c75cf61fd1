"""Parts of methods that learn or remember; their state goes into the checkpoint."""

from nnunet_ssl.modules.backbones import Backbone, check_backbone, pretrained_backbone
from nnunet_ssl.modules.bank import ClassBank
from nnunet_ssl.modules.brake import ClassBrake, class_shares
from nnunet_ssl.modules.clusters import TokenClusters
from nnunet_ssl.modules.diffusion import DiffusionNetwork
from nnunet_ssl.modules.drift import DriftGauge, confirmed_for, confirms_itself
from nnunet_ssl.modules.insertion import finest_stage, insert_after_stage, take_from_stage
from nnunet_ssl.modules.lora import LowRank, add_low_rank
from nnunet_ssl.modules.mamba import HighFrequencyMamba, SelectiveSSM
from nnunet_ssl.modules.moments import ClassMoments
from nnunet_ssl.modules.networks import MeanOfNetworks, linked_prob, other_network
from nnunet_ssl.modules.perturb import dropout_factors, perturbed_forward
from nnunet_ssl.modules.projector import Projector
from nnunet_ssl.modules.readiness import Readiness, overlap_counts
from nnunet_ssl.modules.scores import ScoreMemory
from nnunet_ssl.modules.slice_network import ImageSegmenter, SliceNetwork
from nnunet_ssl.modules.tap import Tapped, decode, tapped_forward
from nnunet_ssl.modules.thresholds import ClassThresholds

__all__ = [
    "Backbone",
    "ClassBank",
    "ClassBrake",
    "ClassMoments",
    "ClassThresholds",
    "DiffusionNetwork",
    "DriftGauge",
    "HighFrequencyMamba",
    "ImageSegmenter",
    "LowRank",
    "MeanOfNetworks",
    "Projector",
    "Readiness",
    "ScoreMemory",
    "SelectiveSSM",
    "SliceNetwork",
    "Tapped",
    "TokenClusters",
    "add_low_rank",
    "check_backbone",
    "class_shares",
    "confirmed_for",
    "confirms_itself",
    "decode",
    "dropout_factors",
    "finest_stage",
    "insert_after_stage",
    "linked_prob",
    "other_network",
    "overlap_counts",
    "perturbed_forward",
    "pretrained_backbone",
    "take_from_stage",
    "tapped_forward",
]
