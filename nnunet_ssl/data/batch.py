"""What a method sees of one step's data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """Labelled and unlabelled patches of one step, on the training device.

    Attributes:
        x_l: labelled images after nnU-Net's training augmentation, (B, C, *).
        y_l: their targets: a list over deep-supervision scales, full resolution first, or one
            tensor without deep supervision; (B, 1, *) labels, or (B, R[+1], *) bool for regions,
            the last channel being the ignore label if there is one.
        valid_l: (B, 1, *) bool, False on padding.
        forced_fg_l: (B,) bool, True where the loader forced foreground into the patch.
        keys_l: case ids.
        mixed_l: True if the annotated patches show boxes of each other, see `labeled_mix`.
        x_u: unlabelled images, weak view (spatial transforms and mirroring only), (B, C, *);
            None while the method does not need them.
        valid_u, forced_fg_u, keys_u: as for the labelled part.
        views: the further unlabelled views that the trainer declared, name -> (B, C, *).
        meta_l, meta_u: the values that the trainer declared, name -> tensor with B rows.
    """

    x_l: Tensor
    y_l: list[Tensor] | Tensor
    valid_l: Tensor
    forced_fg_l: Tensor
    keys_l: list[str]
    mixed_l: bool = False
    x_u: Tensor | None = None
    valid_u: Tensor | None = None
    forced_fg_u: Tensor | None = None
    keys_u: list[str] = field(default_factory=list)
    views: dict[str, Tensor] = field(default_factory=dict)
    meta_l: dict[str, Tensor] = field(default_factory=dict)
    meta_u: dict[str, Tensor] = field(default_factory=dict)

    @property
    def target(self) -> Tensor:
        """The full-resolution target of the labelled part."""
        return self.y_l[0] if isinstance(self.y_l, list) else self.y_l

    @classmethod
    def from_loader(cls, batch: Mapping[str, Any], device: torch.device) -> "Batch":
        """Move what the two-stream loader made to the training device."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, list):
                return [move(v) for v in value]
            if isinstance(value, Mapping):
                return {k: move(v) for k, v in value.items()}
            return value

        labeled = cls(
            x_l=move(batch["data"]),
            y_l=move(batch["target"]),
            valid_l=move(batch["valid"]),
            forced_fg_l=move(batch["forced_fg"]),
            keys_l=list(batch["keys"]),
            meta_l=move(batch["meta"]),
        )
        unlabeled = batch.get("unlabeled")
        if unlabeled is not None:
            labeled.x_u = move(unlabeled["data"])
            labeled.valid_u = move(unlabeled["valid"])
            labeled.forced_fg_u = move(unlabeled["forced_fg"])
            labeled.keys_u = list(unlabeled["keys"])
            labeled.views = move(unlabeled["views"])
            labeled.meta_u = move(unlabeled["meta"])
        return labeled
