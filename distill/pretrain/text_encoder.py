"""Trains the embedded teacher's CLIPTextModel towards a sentence encoder (knowledge distillation of the vectors).

A thousand captions cannot teach words that are not among them. The student therefore imitates MiniLM's sentence
vectors on single words, captions and word combinations; the diffusion model later reads its token states.
"""

import json
import logging
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...pipelines.export import Export
from ..errors import UserError
from ..scorers.minilm import minilm_folder
from ..training.contract import Batch, Method, Parts, Progress
from .settings import TextEncoderSettings

log = logging.getLogger(__name__)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@torch.no_grad()
def sentence_vectors(phrases: list[str], batch_size: int = 256) -> Tensor:
    """MiniLM's L2-normalised masked means, (N, 384) float32."""
    folder = str(minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    out = []
    for start in tqdm(range(0, len(phrases), batch_size), desc="sentence vectors", unit="batch"):
        inputs = tokenizer(phrases[start : start + batch_size], padding=True, return_tensors="pt")
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        out.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(out)


def distinct(captions: list[str]) -> list[str]:
    """The captions that have words, each once, in order. UserError where there are none."""
    kept = sorted({c for c in captions if c.split()})
    if not kept:
        raise UserError(
            "data.name: the data have no captions, and a text encoder learns from them: give a NAME.txt beside each "
            "NAME.png or a metadata.jsonl, or take the names of class folders (--data.caption_column label)"
        )
    return kept


def training_phrases(captions: list[str], settings: TextEncoderSettings) -> list[str]:
    """Distinct phrases from the captions of the training split and MiniLM's whole words, the frequent ones first."""
    rng = random.Random(0)
    captions = distinct(captions)
    most = settings.phrases_per_caption * len(captions)
    lines = (minilm_folder() / "vocab.txt").read_text().split()
    words = [w for w in lines if w.isascii() and w.isalpha() and len(w) > 1][: min(settings.num_words, most)]
    own = sorted({w for c in captions for w in c.split()})
    phrases = dict.fromkeys([*captions, *own, *words])
    for _ in range(min(settings.num_edits, most)):
        edited = rng.choice(captions).split()
        edited[rng.randrange(len(edited))] = rng.choice(own if rng.random() < 0.5 else words)
        phrases[" ".join(edited)] = None
    for _ in range(min(settings.num_combinations, most)):
        pool = [own, words]
        phrases[" ".join(rng.choice(pool[rng.random() < 0.5]) for _ in range(rng.choice((2, 3))))] = None
    return list(phrases)


def train_tokenizer(phrases: list[str], size: int, max_length: int) -> CLIPTokenizer:
    """A CLIPTokenizer whose byte-pair merges were counted on `phrases`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=size, end_of_word_suffix="</w>", special_tokens=[BOS, EOS], show_progress=False
    )
    bpe.train_from_iterator(phrases, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return CLIPTokenizer(
        vocab=model["vocab"], merges=merges, bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=EOS,
        model_max_length=max_length,
    )  # fmt: skip


class TextEncoder(Method):
    """Minimises 1 - cos(W h_eos, MiniLM(phrase)); W is a training-time projection that is not exported."""

    Settings = TextEncoderSettings
    ids: Tensor
    vectors: Tensor

    def __init__(self, settings: TextEncoderSettings, parts: Parts):
        super().__init__(settings, parts)
        phrases = training_phrases(parts.captions, settings)
        told = f"{len(phrases)} training phrases from {len(set(parts.captions))} distinct captions"
        self.tokenizer = train_tokenizer(phrases, settings.vocabulary_size, settings.max_length)
        long = [c for c in set(parts.captions) if len(self.tokenizer(c).input_ids) > settings.max_length]
        cut = f", {len(long)} of them cut at max_length, {settings.max_length} tokens" if long else ""
        log.warning("text encoder: %s%s", told, cut)
        ids = self.tokenizer(phrases, padding="max_length", truncation=True, return_tensors="pt").input_ids
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("vectors", sentence_vectors(phrases), persistent=False)
        self.model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=settings.hidden_size,
                intermediate_size=4 * settings.hidden_size,
                projection_dim=settings.hidden_size,
                num_hidden_layers=settings.num_layers,
                num_attention_heads=settings.num_heads,
                max_position_embeddings=settings.max_length,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )
        self.project = nn.Linear(settings.hidden_size, self.vectors.shape[1])

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"text_encoder": [*self.model.parameters(), *self.project.parameters()]}

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        rows = batch.draws.integers(0, len(self.ids))
        guess = self.project(self.model(self.ids[rows]).pooler_output)
        cosine = F.cosine_similarity(guess, self.vectors[rows], dim=-1).mean()
        return {"loss": 1 - cosine, "cosine": cosine}

    def export(self) -> Export:
        return Export(self.model, beside=(self.tokenizer,))
