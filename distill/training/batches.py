"""Micro-batches of a run: which rows, from which cache, with which random numbers."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ..config.run import RunConfig
from ..data.cache import LatentCache, PromptCache, SampledLatents
from ..data.images import ImageData
from ..data.sampler import rows_of
from ..diffusion.condition import Condition
from ..diffusion.draws import Draws, mix
from ..errors import UserError
from ..models.codec import Codec
from ..models.frozen import content_hash
from ..models.teacher import LatentTeacher, Teacher
from .contract import Batch
from .teacher_data import TeacherData


class Batches:
    """The batches of every iteration, a pure function of (seed, iteration): nothing to store, nothing to skip.

    Row j of the global batch has its own data row and random numbers, so the split into processes and
    accumulation steps changes nothing here, and in a loss that is a mean over rows nothing but the order of sums.
    It does change what is drawn or computed for a process's rows together: the masks of dropout (student.dropout,
    student.lora_dropout), which come from the process's own generator, a coupling of noise within the batch (lct), and
    a contrastive loss (rg_lcd's proxy).
    """

    def __init__(
        self,
        config: RunConfig,
        needs: frozenset[str],
        data: ImageData,
        teacher: Teacher | None,
        codec: Codec | None,
        accelerator: Accelerator,
    ):
        self.config, self.needs, self.data, self.accelerator = config, needs, data, accelerator
        self.device = accelerator.device
        if config.data.random_flip and ("latents" in needs or "images" not in needs):
            raise UserError("data.random_flip: this method trains on cached latents; leave it off")
        made = isinstance(data, TeacherData) and "latents" in needs
        if "prompts" in needs or made:
            if not isinstance(teacher, LatentTeacher):
                raise UserError("teacher: missing; prompts are encoded by a latent teacher's text encoder")
            self.texts_made_by = teacher.texts_hash()
            self.prompts = self._prompt_cache(teacher)
            self.told, self.empty = teacher.told, teacher.encode_empty()
        if "latents" in needs:
            if codec is None:
                raise UserError(
                    "teacher: missing; latents are encoded by a latent teacher's autoencoder or `vae`"
                )
            self.latents: LatentCache = (
                self._sampled(data) if isinstance(data, TeacherData) else self._latent_cache(codec)
            )
        if "labels" in needs:
            self.labels = torch.tensor(data.labels)

    def micro_batches(self, iteration: int) -> list[Batch]:
        """This process's gradient_accumulation_steps batches of train_batch_size."""
        c, a = self.config, self.accelerator
        size, micro = c.train_batch_size, c.gradient_accumulation_steps
        total = size * micro * a.num_processes
        rows = rows_of(mix(c.seed, 1), iteration, total, len(self.data))
        first = a.process_index * micro * size
        slots = [range(first + i * size, first + (i + 1) * size) for i in range(micro)]
        return [
            self._batch([rows[j] for j in slot], Draws(c.seed, iteration, slot, self.device))
            for slot in slots
        ]

    def _batch(self, rows: list[int], draws: Draws) -> Batch:
        batch = Batch(draws, captions=[self.data.captions[i] for i in rows], rows=rows)
        if "images" in self.needs:
            images = (self.data.images(rows).float() / 127.5 - 1).to(self.device)
            if self.config.data.random_flip:
                mirrored = (draws.uniform() < 0.5).view(-1, 1, 1, 1)
                images = torch.where(mirrored, images.flip(-1), images)
            batch.images = images
        if "latents" in self.needs:
            batch.latents = self.latents[rows].to(self.device)
        if "prompts" in self.needs:
            batch.condition = self.told(self.prompts[batch.captions], self.empty).to(self.device)
        if "labels" in self.needs:
            batch.condition = Condition({"class_labels": self.labels[rows]}, {}).to(self.device)
        return batch

    def not_finite(self, batch: Batch) -> tuple[str, Path | None] | None:
        """The first row of a batch that holds something else than finite numbers, and the cache that it is from."""
        told = batch.condition
        for name, tree, cache in (
            ("latent", batch.latents, getattr(self, "latents", None)),
            ("picture", batch.images, None),
            ("prompt's embedding", None if told is None else told.arguments, getattr(self, "prompts", None)),
        ):
            for values in _leaves(tree):
                bad = (~values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
                if bad:
                    row = f"the {name} of row {batch.rows[bad[0]]} ({batch.captions[bad[0]]!r}) of the data"
                    return row, None if cache is None else cache.records.data_path
        return None

    def _latent_cache(self, codec: Codec) -> LatentCache:
        @torch.no_grad()
        def encode(images: Tensor) -> Tensor:
            return codec.posterior(images.to(self.device))

        a = self.accelerator
        return LatentCache.build(
            self.data, encode, key=f"{content_hash(codec.vae)} {codec.vae.dtype}",
            is_main=a.is_main_process, barrier=a.wait_for_everyone, progress=_bar("encoding images", a),
        )  # fmt: skip

    def _sampled(self, data: TeacherData) -> SampledLatents:
        a, network = self.accelerator, data.teacher.family.network
        return SampledLatents.made(
            data, lambda start, stop: data.make(start, stop, self.prompts.__getitem__),
            key=f"{network.dtype} {self.texts_made_by} {content_hash(data.teacher.vae)}",
            batch_size=self.config.train_batch_size,
            is_main=a.is_main_process, barrier=a.wait_for_everyone, progress=_bar("sampling latents", a),
        )  # fmt: skip

    def _prompt_cache(self, teacher: LatentTeacher) -> PromptCache:
        def encode(captions: list[str]) -> dict[str, Tensor]:
            return {k: v.cpu() for k, v in teacher.encode_prompts(captions).items()}

        a = self.accelerator
        return PromptCache.build(
            self.data.captions, encode, key=self.texts_made_by,
            is_main=a.is_main_process, barrier=a.wait_for_everyone, progress=_bar("encoding prompts", a),
        )  # fmt: skip


def _leaves(tree: Any) -> list[Tensor]:
    """The tensors of numbers with a fraction in nested dicts and tuples."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple):
        return [leaf for branch in tree for leaf in _leaves(branch)]
    return [tree] if isinstance(tree, Tensor) and tree.is_floating_point() else []


def _bar(title: str, accelerator: Accelerator):
    """Progress over rows for the caches: called with (done, total)."""
    bar: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if not bar:
            bar.append(tqdm(total=total, desc=title, unit="row", disable=not accelerator.is_main_process))
        bar[0].update(done - bar[0].n)
        if done >= total:
            bar[0].close()

    return show
