"""Self-paced contrastive learning with meta-labels: pre-training and semi-supervised stage."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, nn
from torch.optim import Optimizer

from nnunet_ssl.base import Phase, SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.data.images import ContrastLoader, ImageDataset, NoPatches, regular_patches
from nnunet_ssl.data.loader import META, TwoStreamLoader, has_column, read_case_labels
from nnunet_ssl.data.views import Pipeline
from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import (
    apply_flips,
    cached_gradients,
    full_res,
    pace_at,
    pace_bounds,
    pair_losses,
    pair_weights,
    partition,
    prob_mse,
    random_flips,
    retrieval,
    slice_features,
    slice_positions,
    to_prob,
    warmup_cosine,
    weighted_contrast,
)
from nnunet_ssl.io import write_json
from nnunet_ssl.modules import Projector

PAPER = "Peng et al. 2021, arXiv:2107.13741"
MADE_HERE = ("partition", "patient", "self")  # need no column of cases.csv
FIRST_RATE, LAST_RATE = 1 / 400, 5e-4  # of the peak, published: 5e-7 and 1e-7 of 2e-4
RETRIEVAL = "meta_label_retrieval.json"
RETRIEVAL_PATCHES = 16  # of a case, in the final validation
LEAST_SAMPLES = {2: 12, 3: 4}  # contrasted together, by dimension
FLIPPED = 0.8  # chance of each axis of the second stage's second view, published


def encode(network: Any, x: Tensor) -> Tensor:
    """Return the lowest encoder output, (B, F, *small); the decoder does not run."""
    return network.encoder(x)[-1]


class SelfPacedContrast(SemiSupervisedTrainer):
    """What both stages share: meta-labels, projectors, contrast, pace."""

    networks: ClassVar[str] = "PlainConvUNet, ResidualEncoderUNet"
    needs_unet: ClassVar[bool] = True
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True

    deploy: Literal["teacher", "student"] = "student"
    ema_decay: float | Literal["auto"] | None = None
    # partition (of the scan, by slice position), patient (column of cases.csv, else the case),
    # self (2D: each slice its own label), or any column of cases.csv
    meta_labels: tuple[str, ...] = ("partition", "patient")
    weights: tuple[float, ...] = (1.0, 0.1)  # lambda, of each; the last one for all further labels
    partitions: int = 3  # S, parts of a scan; published 3 for ACDC, 8 for others
    temperature: float = 0.07  # tau
    # linear: w = max(0, 1 - l / gamma); hard: w = 1 where l <= gamma; None: w = 1
    pace: Literal["linear", "hard"] | None = "linear"
    # Deviates: gamma in units of the batch, since the published values do not carry over
    gamma_start: float = 1.0  # first gamma, above log P, P positives a sample
    gamma_end: float = 1.8  # last gamma, in units of the largest possible loss
    pace_power: float = 0.5  # p, of the way between, by epoch
    embedding: int = 256  # size of the projectors' output

    _used: list[str] | None = None  # found when first asked for

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        names = cls.meta_labels
        cls.require(len(set(names)) == len(names) > 0, "meta_labels", "different names")
        cls.require(not set(names) & set(META), "meta_labels", f"none of {', '.join(META)}")
        fits = bool(cls.weights) and min(cls.weights) >= 0
        cls.require(fits, "weights", "numbers of 0 or more, at least one")
        cls.require(cls.partitions >= 2, "partitions", "at least 2")
        cls.require(cls.embedding >= 1, "embedding", "at least 1")
        for name in ("temperature", "gamma_end", "pace_power"):
            cls.require(getattr(cls, name) > 0, name, "above 0")
        cls.require(cls.gamma_start >= 0, "gamma_start", "0 or more")

    @classmethod
    def refuse_unsupported(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        """Refuse also the slice itself as a label where a sample holds many."""
        super().refuse_unsupported(plans, configuration, dataset_json)
        flat = len(plans["configurations"][configuration]["patch_size"]) == 2
        rule = "without self in 3D configurations, where slices of views do not coincide"
        cls.require(flat or "self" not in cls.meta_labels, "meta_labels", rule)

    def initialize(self) -> None:
        """Compile the way to the bottleneck by itself."""
        super().initialize()
        self._encode = torch.compile(encode) if self._do_i_compile() else encode

    def build_companions(self) -> dict[str, nn.Module]:
        """Return a projector for each meta-label."""
        features = self.student.encoder.output_channels[-1]
        heads = [Projector(features, self.embedding) for _ in self.meta_labels]
        return {"projectors": nn.ModuleList(heads)}

    # --- meta-labels

    @property
    def flat(self) -> bool:
        """True for 2D configurations, where a sample is one slice."""
        return len(self.configuration_manager.patch_size) == 2

    @property
    def columns(self) -> list[str]:
        """Meta-labels that stand in cases.csv."""
        columns = [name for name in self.meta_labels if name not in MADE_HERE]
        if "patient" in self.meta_labels and has_column(self.case_table_path, "patient"):
            columns.append("patient")
        return columns

    @property
    def meta(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the loader tells of each sample."""
        return "case", "position" if self.flat else "z_map", *self.columns

    def case_table(self, cases: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return a number for each label of a case."""
        return read_case_labels(self.case_table_path, self.columns, cases)

    def contrast_cases(self) -> nnUNetBaseDataset:
        """Return the cases whose patches are contrasted."""
        return self._unlabeled_cases()

    def check_data(self) -> None:
        """Check also that a meta-label tells something."""
        super().check_data()
        if not self.used_labels:
            raise UserError(
                f"No meta-label of {type(self).__name__} is left for "
                f"{Path(self.preprocessed_dataset_folder_base).name}; see the warnings above. Put "
                f"cases.csv with a column beside dataset.json, preprocess again and name the "
                f"column in +meta_labels=COLUMN"
                + (", or use +meta_labels=self (SimCLR)." if self.flat else ".")
            )

    @property
    def used_labels(self) -> list[str]:
        """Meta-labels without those that tell nothing of this data set."""
        if self._used is None:
            cases = self.contrast_cases()
            one_slice = self.flat and not any(
                cases.load_case(case)[0].shape[1] > 1 for case in cases.identifiers
            )
            table = self.case_table(cases.identifiers)
            self._used = []
            for name in self.meta_labels:
                fault = self._fault(name, table, len(cases.identifiers), one_slice)
                if fault is None:
                    self._used.append(name)
                else:
                    self.print_to_log_file(f"WARNING: meta-label {name} is left out: {fault}.")
        return self._used

    def _fault(
        self, name: str, table: Mapping[str, Mapping[str, float]], cases: int, one_slice: bool
    ) -> str | None:
        """Say why a meta-label would teach nothing."""
        if name == "self":
            return None
        if name == "partition":
            return "every case is one slice" if one_slice else None
        values = [row[name] for row in table.values()] if name in self.columns else range(cases)
        known = [v for v in values if v >= 0]
        if len(set(known)) < 2:
            return "it is the same for all cases"
        if one_slice and len(set(known)) == len(known):
            return "it differs between any two images"
        return None

    def label_values(
        self, meta: Mapping[str, Tensor], valid: Tensor, slices: int, views: int = 1
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the meta-labels of all slices of a batch, and which slices count.

        Args:
            meta: what the loader told, B rows.
            valid: (B, 1, *) bool, False outside the scan.
            slices: of the feature map; 1 in 2D.
            views: of each sample, standing one after the other in B.

        Returns:
            name -> (B * slices,) int64, negative where unknown; and (B * slices,) bool.
        """
        if self.flat:
            position, counted = meta["position"][:, 0], valid.flatten(1).any(1)
        else:
            position, counted = slice_positions(meta["z_map"], valid, slices)
        found = {}
        for name in self.used_labels:
            if name == "partition":
                found[name] = partition(position, self.partitions)
            elif name == "self":
                found[name] = torch.arange(len(valid), device=valid.device) % (len(valid) // views)
            else:
                value = meta[name if name in meta else "case"]
                found[name] = value.long().repeat_interleave(slices)
        return found, counted

    # --- contrast

    def embed(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the embeddings of all slices of a batch, one for each meta-label in use."""
        feature = slice_features(self._encode(self.student, x))
        heads = zip(self.meta_labels, self.companions["projectors"], strict=True)
        with torch.autocast(x.device.type, enabled=False):
            return tuple(head(feature) for name, head in heads if name in self.used_labels)

    def contrast(
        self, x: Tensor, valid: Tensor, meta: Mapping[str, Tensor], chunk: int, weight: float
    ) -> Iterator[Terms]:
        """Yield the contrastive terms of two views; gradients reach encoder and projectors.

        Args:
            x: (2N, C, *), all first views, then all second ones.
            valid: (2N, 1, *) bool, False outside the scan.
            meta: what the loader told, 2N rows.
            chunk: samples whose activations are kept at a time; fewer than 2N cost another pass.
            weight: of all terms.
        """

        def joint(outputs: list[tuple[Tensor, ...]]) -> Terms:
            embeddings = [torch.cat(chunks) for chunks in zip(*outputs, strict=True)]
            slices = len(embeddings[0]) // len(x)
            labels, counted = self.label_values(meta, valid, slices, views=2)
            losses = (
                self.self_paced(name, z, labels[name], counted)
                for name, z in zip(self.used_labels, embeddings, strict=True)
            )
            return {
                f"unsup_{name}": weight * self.weight_of(name) * loss
                for name, loss in zip(self.used_labels, losses, strict=True)
            }

        if len(x) <= chunk:
            yield joint([self.embed(x)])
        else:
            yield from cached_gradients(self.embed, x.split(chunk), joint)

    def weight_of(self, name: str) -> float:
        """Return the weight of a meta-label."""
        return self.weights[min(self.meta_labels.index(name), len(self.weights) - 1)]

    def self_paced(self, name: str, z: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """Return the contrast by one meta-label, each pair weighted by how easy it is."""
        pairs = pair_losses(z, labels, self.temperature, counted)
        weights = torch.ones_like(pairs.loss)
        if self.pace is not None:
            first, last = pace_bounds(pairs, self.temperature, self.gamma_start, self.gamma_end)
            # once an epoch, as published
            part = pace_at(self.current_epoch / self.num_epochs, self.pace_power)
            gamma = first + (last - first) * part
            weights = pair_weights(pairs.loss, gamma, self.pace)
            self.track(f"gamma_{name}", gamma)
            mean = (weights * pairs.positive).sum() / pairs.positive.sum()
            self.track(f"pair_weight_{name}", mean)
        return weighted_contrast(pairs, weights)


class WarmupCosine:
    """Learning rate of each epoch; stands where nnU-Net has its polynomial.

    Args:
        optimizer: whose rate is set.
        peak: rate at the end of the warm-up.
        epochs: of the training.
        warmup: fraction of them.
    """

    def __init__(self, optimizer: Optimizer, peak: float, epochs: int, warmup: float):
        self.optimizer, self.peak, self.epochs, self.warmup = optimizer, peak, epochs, warmup

    def step(self, epoch: int) -> None:
        """Set the rate of an epoch."""
        factor = warmup_cosine(epoch / self.epochs, self.warmup, FIRST_RATE, LAST_RATE)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * factor


class SSLTrainerSPCLPretrain(SelfPacedContrast):
    """SPCL, first stage: the encoder learns to tell meta-labels apart, on all images.

    Peng, Wang, Desrosiers & Pedersoli, NeurIPS 2021, arXiv:2107.13741; the authors' released code.

        f = encoder(two views of N slices, of all parts of many scans, annotated or not)
        z = g_k(mean of f over the slice), of length 1                        for each meta-label k
        l_ij = -log [exp(z_i z_j / tau) / sum over all a but i of exp(z_i z_a / tau)]
        L_k  = mean over i, mean over j with i's label, of w_ij l_ij
        w_ij = max(0, 1 - l_ij / gamma), or [l_ij <= gamma];  gamma grows with the root of the epoch
        L    = sum_k lambda_k L_k

    Trains the encoder and the projectors g; the decoder stays as it was drawn. No mask is opened:
    both validations tell how often the nearest slice of another scan has the same meta-label.
    The checkpoint is for `-pretrained_weights` of any trainer with one network.

    Deviates: gamma in units of the batch (first: log of the positives a sample + `gamma_start`;
    last: `gamma_end` times the largest possible loss), because the published values do not carry
    over; `gamma_start=0.06+gamma_end=1.83` are the published ones of partition at the published
    batch. Parts are of equal size, of the scan as nnU-Net crops it (to what is not 0). nnU-Net's
    network, crops and augmentation. 3D: each slice of the lowest feature map is a sample, its part
    known from a map of positions that goes through the augmentation with the patch. A meta-label
    that is the same everywhere is left out.
    """

    method: ClassVar[str] = "Self-paced contrastive pre-training"
    paper: ClassVar[str] = PAPER
    twin: ClassVar[str] = ""  # it predicts nothing
    # batch 2 in 3D; 0.6 for batches from 12 in 2D; the encoder is .3 of a PlainConvUNet
    step_cost: ClassVar[float] = 1.5

    num_epochs: int = 50
    initial_lr: float = 2e-4  # peak, of RAdam
    weight_decay: float = 1e-5
    warmup: float = 0.125  # fraction of training until the peak
    # plan batches of samples that are contrasted together; above 1 activations stay those of one,
    # at the price of another pass; auto: as many as make 12 slices, or 4 patches in 3D
    contrast_batches: int | Literal["auto"] = "auto"

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        cls.require(0 <= cls.warmup < 1, "warmup", "in [0, 1)")
        batches = cls.contrast_batches
        cls.require(batches == "auto" or batches >= 1, "contrast_batches", "auto, or at least 1")

    # --- training

    def new_optimizer(self, modules: Sequence[nn.Module]) -> Optimizer:
        """Return the published optimizer."""
        parameters = [p for m in modules for p in m.parameters()]
        return torch.optim.RAdam(parameters, self.initial_lr, weight_decay=self.weight_decay)

    def configure_optimizers(self) -> tuple[Optimizer, WarmupCosine]:
        """Return the optimizer of the encoder, and its schedule."""
        optimizer = self.new_optimizer([self.network.encoder])
        return optimizer, WarmupCosine(optimizer, self.initial_lr, self.num_epochs, self.warmup)

    def phases(self) -> list[Phase]:
        """Return the one update, of encoder and projectors."""
        modules = [self.network.encoder, self.companions["projectors"]]
        self.optimizer = self.lr_scheduler.optimizer = self.new_optimizer(modules)
        return [Phase("main", modules, self.optimizer, self.losses)]

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the contrast over both views."""
        yield from self.contrast(batch.x_u, batch.valid_u, batch.meta_u, 2 * self.batch_size, 1.0)

    # --- data

    def contrast_cases(self) -> ImageDataset:
        """Return the images of the training cases and of those without masks."""
        labeled, _ = self.do_split()
        folders = dict.fromkeys(labeled, self.preprocessed_dataset_folder)
        unlabeled = self._unlabeled_cases()
        return ImageDataset(folders | dict.fromkeys(unlabeled.identifiers, unlabeled.source_folder))

    def make_loaders(
        self, train_transforms: Any, val_transforms: Any, initial_patch_size: Sequence[int]
    ) -> tuple[TwoStreamLoader, nnUNetDataLoader]:
        """Return loaders of images alone."""
        patch_size, cases = self.configuration_manager.patch_size, self.contrast_cases()
        batches = self.contrast_batches
        if batches == "auto":
            batches = -(-LEAST_SAMPLES[len(patch_size)] // self.batch_size)
        options: dict[str, Any] = {
            "parts": self.partitions,
            "masked": self.configuration_manager.use_mask_for_norm,
            "meta": self.meta,
            "table": self.case_table(cases.identifiers),
            "slice_axis": self.plans_manager.transpose_forward[0],
        }
        train = ContrastLoader(
            cases,
            2 * batches * self.batch_size,
            initial_patch_size,
            patch_size,
            self.label_manager,
            Pipeline(train_transforms, False, ("stock",), get_allowed_n_proc_DA() == 0),
            num_views=2,
            **options,
        )
        val = ContrastLoader(
            cases,
            self.batch_size,
            patch_size,
            patch_size,
            self.label_manager,
            Pipeline(val_transforms, False),
            num_views=1,
            **options,
        )
        none = NoPatches(self.num_input_channels, patch_size)
        return TwoStreamLoader(none, train, self._unlabeled_active), val

    # --- validation

    @torch.no_grad()
    def validation_step(self, batch: dict) -> dict:
        """Return features and meta-labels of a batch."""
        x, valid = batch["data"].to(self.device), batch["valid"].to(self.device)
        meta = {name: value.to(self.device) for name, value in batch["meta"].items()}
        with self._autocast():
            feature = slice_features(self._encode(self.student, x))
        slices = len(feature) // len(x)
        labels, counted = self.label_values(meta, valid, slices)
        return {
            "feature": feature,
            "labels": {n: torch.where(counted, v, -1) for n, v in labels.items()},
            "case": meta["case"].repeat_interleave(slices),
            "patches": len(x),
        }

    def score(self, outputs: Sequence[dict]) -> dict[str, dict[str, float]]:
        """Return for each meta-label how often the nearest sample has it, and chance.

        Samples of one case are not compared; for the patient, those of one patch.
        """
        feature = torch.cat([o["feature"] for o in outputs])
        case = torch.cat([o["case"] for o in outputs])
        patches = sum(o["patches"] for o in outputs)
        patch = torch.arange(patches, device=case.device).repeat_interleave(len(case) // patches)
        scores = {}
        for name in self.used_labels:
            if name != "self":
                labels = torch.cat([o["labels"][name] for o in outputs])
                found = retrieval(feature, labels, patch if name == "patient" else case)
                hits, chance = torch.stack(found).nan_to_num().tolist()
                scores[name] = {"retrieval": hits, "chance": chance}
        return scores

    def tell(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Write the scores into nnU-Net's log."""
        told = [f"{k} {v['retrieval']:.3f} (chance {v['chance']:.3f})" for k, v in scores.items()]
        self.print_to_log_file(f"Nearest slice has the same meta-label: {', '.join(told)}")

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Log the retrieval where nnU-Net has its pseudo-Dice."""
        scores = self.score(val_outputs)
        self.tell(scores)
        for name, values in scores.items():
            self.track(f"retrieval_{name}", values["retrieval"])
        found = [values["retrieval"] for values in scores.values()]
        mean = float(np.mean(found)) if found else 0.0
        self.logger.log("mean_fg_dice", mean, self.current_epoch)
        self.logger.log("dice_per_class_or_region", found, self.current_epoch)
        self.logger.log("val_losses", 1 - mean, self.current_epoch)
        self._pseudo_dice: dict = {}  # nothing is segmented

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Write the retrieval over patches from all cases; nothing is segmented."""
        self.network.eval()
        cases = self.contrast_cases()
        table, ids = self.case_table(cases.identifiers), list(cases.identifiers)
        size = self.configuration_manager.patch_size
        axis = self.plans_manager.transpose_forward[0]
        patches, outputs = regular_patches(cases, size, RETRIEVAL_PATCHES, axis), []
        while some := list(islice(patches, self.batch_size)):
            names, images, places = zip(*some, strict=True)
            x, z = torch.stack(images), torch.stack(places)  # z: (B, 1) in 2D, (B, D) in 3D
            z_map = z.view(len(x), 1, -1, *[1] * (x.ndim - 3)).expand(-1, 1, *x.shape[2:])
            meta = {
                "case": torch.tensor([ids.index(name) for name in names]),
                "position": z[:, :1],
                "z_map": z_map,
                **{k: torch.tensor([table[name][k] for name in names]) for k in self.columns},
            }
            inside = (z_map >= 0) & (z_map <= 1)
            batch = {"data": x, "valid": inside, "meta": meta}
            outputs.append(self.validation_step(batch))
        scores = self.score(outputs)
        self.tell(scores)
        write_json(scores, Path(self.output_folder) / RETRIEVAL)


class SSLTrainerSPCL(SelfPacedContrast):
    """SPCL, second stage: nnU-Net's training with the contrast of unlabelled patches beside it.

    Peng, Wang, Desrosiers & Pedersoli, NeurIPS 2021, arXiv:2107.13741; the authors' released code.
    Start it from the first stage (`SSLTrainerSPCLPretrain`) with `-pretrained_weights`; the command
    `nnunet_ssl spcl` runs both.

        f = encoder(two intensity views of unlabelled patches, the second one flipped)
        L = sup(l) + w sum_k lambda_k L_k(f)            L_k as in the first stage, gamma grows again
          (+ c mean (softmax(student(view)) - softmax(teacher(u)))^2  with consistency_weight = c)

    The student predicts. The projectors are new and are not saved for prediction.

    Deviates: the weight of the contrast is the published search's middle, the ratio to nnU-Net's
    CE + Dice instead of CE. nnU-Net's SGD. In 3D slices change places with the flips, and with them
    their part of the scan. Which run stands in the paper's table is open: the figures' job names
    have a mean teacher beside the contrast, as `consistency_weight=0.8+ema_decay=0.999` does here,
    but for its weights, which the authors shrink by 1e-5 a step. gamma and 3D: as in the first
    stage.
    """

    method: ClassVar[str] = "Self-paced contrast with meta-labels"
    paper: ClassVar[str] = PAPER
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=None+deploy=student"
    pretraining: ClassVar[str] = SSLTrainerSPCLPretrain.__name__
    views: ClassVar[tuple[str, ...]] = ("stock",)
    step_cost: ClassVar[float] = 1.6  # with a PlainConvUNet, whose encoder is .3 of it

    # of all meta-labels together; Deviates: beside CE + Dice; published search 0.001 to 10
    contrast_weight: float = 0.1
    consistency_weight: float = 0.0  # c, of the mean teacher; the authors' combination has 0.8

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        for name in ("contrast_weight", "consistency_weight"):
            cls.require(getattr(cls, name) >= 0, name, "0 or more")
        rule = "0 without a teacher; add +ema_decay=0.999"
        cls.require(
            cls.consistency_weight == 0 or cls.ema_decay is not None, "consistency_weight", rule
        )

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the supervised loss, then the contrast, then the consistency."""
        yield {"sup": self.loss(self.student(batch.x_l), batch.y_l)}
        view = batch.views["stock"]
        if self.contrast_weight:
            axes = self.inference_allowed_mirroring_axes or ()
            flips = random_flips(len(view), axes, FLIPPED)

            def both(first: Tensor, second: Tensor) -> Tensor:
                moved = second.ndim == view.ndim  # maps, not values of a sample
                return torch.cat([first, apply_flips(second, flips, axes) if moved else second])

            x = both(view, self.strong_intensity(batch.x_u, batch.valid_u))
            meta = {name: both(value, value) for name, value in batch.meta_u.items()}
            valid = both(batch.valid_u, batch.valid_u)
            yield from self.contrast(x, valid, meta, len(x), self.contrast_weight)
        if self.consistency_weight:
            prob_t = self.teacher_prob(batch.x_u)
            self.track_pseudo_labels(prob_t, batch.valid_u, batch.valid_u)
            prob = to_prob(full_res(self.student(view)), self.regions)
            loss = prob_mse(prob, prob_t, batch.valid_u)
            yield {"unsup_mse": self.consistency_weight * loss}
