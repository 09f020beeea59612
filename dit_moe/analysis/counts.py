"""ExpertCounts: what a recorder counted, as numpy arrays with their provenance, kept in one .npz file."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..checkpoint.files import written_aside

FORMAT = 1
_ARRAYS = ("images", "steps", "patches", "step_patches", "class_ids")


class IncompleteCountsError(RuntimeError):
    """The counts do not hold every choice of every image: a model call was missed, or counted twice."""


@dataclass(frozen=True)
class ExpertCounts:
    """How often each expert was chosen.

    I images, L routed layers, S sampling steps (0 is the noisiest), N tokens of an image in raster order, E experts.
    G groups of images that follow each other are kept apart for steps and patches, so that they can be resampled.

    Args:
        images: (I, L, E) int, choices of each image over all steps and tokens.
        steps: (G, L, S, E) int, choices at each step.
        patches: (G, L, N, E) int, choices of each token position.
        step_patches: (S, L, N, E) int, choices of each position at each step, or None.
        class_ids: (I,) int, class of each image.
        num_classes: C; class C is the null class.
        top_k: K, choices of each token.
        images_per_group: image i belongs to group i // images_per_group.
        half: which half of a guided batch was counted: "conditional", "unconditional" or "both".
        provenance: where the counts come from, as JSON can hold it.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    images: np.ndarray
    steps: np.ndarray
    patches: np.ndarray
    step_patches: np.ndarray | None
    class_ids: np.ndarray
    num_classes: int
    top_k: int
    images_per_group: int
    half: str = "conditional"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_images, num_layers, num_experts = self.images.shape
        groups, _, steps, _ = self.steps.shape
        tokens = self.patches.shape[2]
        for name, shape in (
            ("steps", (groups, num_layers, steps, num_experts)),
            ("patches", (groups, num_layers, tokens, num_experts)),
            ("step_patches", (steps, num_layers, tokens, num_experts)),
            ("class_ids", (num_images,)),
        ):
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")

    @property
    def num_images(self) -> int:
        """I, the images counted."""
        return self.images.shape[0]

    @property
    def num_layers(self) -> int:
        """L, the routed layers."""
        return self.images.shape[1]

    @property
    def num_experts(self) -> int:
        """E, experts of each layer."""
        return self.images.shape[2]

    @property
    def num_steps(self) -> int:
        """S, the sampling steps."""
        return self.steps.shape[2]

    @property
    def num_tokens(self) -> int:
        """N, the tokens of an image."""
        return self.patches.shape[2]

    def by_class(self) -> np.ndarray:
        """(C + 1, L, E) int64: choices of each class, the null class last."""
        totals = np.zeros((self.num_classes + 1, self.num_layers, self.num_experts), dtype=np.int64)
        np.add.at(totals, self.class_ids, self.images)
        return totals

    def check_complete(self) -> None:
        """Compare the totals with N * K choices of each image at each step and layer.

        Raises:
            IncompleteCountsError: they differ; names the first array and where.
        """
        halves = 2 if self.half == "both" else 1
        group_sizes = np.bincount(np.arange(self.num_images) // self.images_per_group, minlength=len(self.steps))
        choices = self.top_k * halves
        expected = {
            "images": np.full(self.images.shape[:2], self.num_tokens * self.num_steps * choices),
            "steps": np.broadcast_to(group_sizes[:, None, None] * self.num_tokens * choices, self.steps.shape[:3]),
            "patches": np.broadcast_to(group_sizes[:, None, None] * self.num_steps * choices, self.patches.shape[:3]),
        }
        if self.step_patches is not None:
            expected["step_patches"] = np.full(self.step_patches.shape[:3], self.num_images * choices)
        for name, totals in expected.items():
            got = getattr(self, name).sum(-1, dtype=np.int64)
            if not np.array_equal(got, totals):
                where = tuple(int(axis[0]) for axis in np.nonzero(got != totals))
                raise IncompleteCountsError(
                    f"{name}{list(where)}: got {got[where]} choices, expected {totals[where]}: a call of the model was "
                    "missed (a graph captured before recording began?) or counted twice"
                )

    def save(self, path: str | os.PathLike) -> None:
        """Write everything to one .npz file, which appears only when it is whole."""
        meta = {
            "format": FORMAT,
            "num_classes": self.num_classes,
            "top_k": self.top_k,
            "images_per_group": self.images_per_group,
            "half": self.half,
            "provenance": self.provenance,
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        with written_aside(path) as aside, open(aside, "wb") as file:
            np.savez_compressed(file, meta=np.array(json.dumps(meta)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ExpertCounts:
        """Read what `save` wrote.

        Raises:
            ValueError: another kind of file, or a newer format.
            OSError: the file cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(str(file["meta"]))
                arrays: dict[str, Any] = {name: file[name] if name in file else None for name in _ARRAYS}
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{os.fspath(path)}: not a file of expert counts ({error})") from error
        if meta.pop("format", None) != FORMAT:
            raise ValueError(f"{os.fspath(path)}: not in format {FORMAT} of expert counts")
        return cls(**arrays, **meta)
