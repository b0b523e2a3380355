"""The loop of searches: candidates on fixed noise, a log to resume from, export, and a report on fresh noise."""

import math
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...pipelines.export import is_own, write_variant
from ..config.search import SearchConfig
from ..config.third_party import quiet
from ..diffusion.draws import mix
from ..errors import UserError
from ..models.quantise import held_bytes
from ..readers import fitting
from ..reports.judges import inputs_for
from ..reports.opening import choose_device
from ..reports.pipeline_source import NotFinite, PipelineSource
from ..reports.remote_code import own_code
from ..training.announcements import device_name, search_closing, search_opening
from ..training.grid import rows_image
from ..training.interrupts import held_back
from ..training.model_card import Made, search_card
from ..training.run_export import put_beside
from ..training.run_folder import LOG, RunFolder, log_lines
from ..training.run_lock import locked
from ..writers import recover, write_folder
from .candidates import Candidate, Search, SearchParts, Trial, TrialRow, ranked
from .fitness import Fitness
from .report import Cell, report
from .student_folder import StudentFiles

SHOWN = 8  # pictures in a card
SEARCH_BLOCK = 1000  # noise of the search lies above the report's seed blocks 0, 1, ...


class SearchRunner:
    """Runs one search in its folder; repeating it goes on after the last candidate, a finished one is left alone.

    Every candidate of every subject gets the same prompts and noise. The finalists and the baselines are scored again
    on other noise, which chooses the winner: the best of many on one noise is partly its luck.
    """

    def __init__(self, config: SearchConfig):
        self.config = config
        self.folder = RunFolder(config)
        self.run = self.folder.path

    def finished(self) -> bool:
        return self.folder.finished()

    def search(self) -> str:
        """Search, export and report; returns the report's text.

        Ctrl-C stops after the candidate it interrupts, SIGTERM and SIGHUP at once: every candidate before is kept.
        Raises UserError where another command is at work in the folder.
        """
        with locked(self.run):
            return self._search()

    def _search(self) -> str:
        for folder in (self.run, self.run / "cells"):
            recover(folder)
        self.folder.compare_config()
        if not self.folder.binding():  # what an earlier start prepared may be of other values
            shutil.rmtree(self.run / "student", ignore_errors=True)
        quiet()
        self._build()
        self.folder.write_config()
        self.folder.cut_log(2**62)
        tqdm.write(search_opening(self.config, len(self._rows()), device_name(self.device)))
        cells: list[Cell] = []
        for subject in self.search_.subjects:
            self.source = self._open(subject)
            if not self._propose(subject):
                tqdm.write(f"interrupted after {len(self._rows())} candidates; repeat the command to go on")
                raise KeyboardInterrupt
            cells += self._export(subject, self._choose(subject))
        text = report(self.config, self.search_, self.run, cells, self._rows())
        self.folder.record_export(len(self._rows()), [c.folder for c in cells], self._cost(cells[0]))
        closing = search_closing(self.config, has_code=bool(own_code(self.run / "pipeline")))
        return f"{text}\n{closing}"

    def _build(self) -> None:
        c = self.config
        self.device = choose_device(None)
        self.files = StudentFiles.find(c.student, self.run)
        parts = SearchParts(self.files.pipeline, self.files.run, c.steps, c.seed, c.max_candidates)
        self.search_: Search = c.method.load()(c.method.settings, parts)
        self.fitness = Fitness(c.fitness, c.data, self.device, c.batch_size)

    def _open(self, subject: str) -> PipelineSource:
        c = self.config
        source = PipelineSource(str(self.files.pipeline), self.device, trust_remote_code=c.trust_remote_code)
        self.call = source.arguments(c.steps, c.guidance_scale)
        source.pipe = self.search_.opened(subject, source.pipe)
        self.inputs = inputs_for(self.fitness.judge, source, max(c.num_images, c.final_images))
        return source

    def _propose(self, subject: str) -> bool:
        """Whether all candidates were scored; False after Ctrl-C."""
        c = self.config
        trials = self._trials(subject, "search")
        bar = tqdm(total=c.max_candidates, initial=len(trials), unit="candidate", desc=subject)
        with held_back(signal.SIGINT) as pending, closing(bar):
            while len(trials) < c.max_candidates and pending.number is None:
                candidate = self.search_.propose(trials)
                if candidate is None:
                    break
                fitness = self._score(subject, "search", candidate, c.num_images, 2 * c.seed)
                trials.append(Trial(candidate, fitness))
                best = ranked(trials)
                bar.set_postfix_str(f"best {best[0].fitness:.4f}" if best else "none finite")
                bar.update()
        return pending.number is None

    def _choose(self, subject: str) -> dict[str, Candidate]:
        """The baselines, and "tuned", the best of the finalists and of them on the second noise."""
        c = self.config
        trials = self._trials(subject, "search")
        names = self.search_.baselines(trials)
        final = [t.candidate for t in ranked(trials) if self.search_.eligible(t.candidate)][: c.finalists]
        final += [b for b in names.values() if b and b not in final]
        done = self._trials(subject, "final")
        for candidate in final[len(done) :]:
            done.append(
                Trial(candidate, self._score(subject, "final", candidate, c.final_images, 2 * c.seed + 1))
            )
        best = [t.candidate for t in (*ranked(done), *ranked(trials)) if self.search_.eligible(t.candidate)]
        if not best:
            raise UserError(
                "fitness: no candidate that may win has a finite value; look at the student's pictures"
            )
        return {**names, "tuned": best[0]}

    def _score(self, subject: str, phase: str, candidate: Candidate, count: int, block: int) -> float | None:
        begun = time.perf_counter()
        self.source.pipe = self.search_.apply(self.source.pipe, candidate)
        try:
            terms = self.fitness(self._pictures(count, block), self._captions(count))
        except NotFinite:
            terms = {"fitness": math.nan}
        kept = {k: v if math.isfinite(v) else None for k, v in terms.items()}
        row = {
            "step": len(self._rows()) + 1,
            "subject": subject,
            "phase": phase,
            **kept,
            "candidate": candidate,
        }
        self.folder.append_log({**row, "seconds": round(time.perf_counter() - begun, 3)})
        return kept["fitness"]

    def _pictures(self, count: int, block: int) -> Tensor:
        parts = []
        for first in range(0, count, self.config.batch_size):
            rows = range(first, min(first + self.config.batch_size, count))
            torch.manual_seed(mix(block, first))  # for pipelines that draw beside their generators
            made, _ = self.source.pictures(rows, self.inputs, SEARCH_BLOCK + block, dict(self.call))
            parts.append(made)
        return torch.cat(parts)

    def _captions(self, count: int) -> Sequence[str]:
        texts = self.inputs.captions
        return [texts[i % len(texts)] for i in range(count)] if texts else []

    def _export(self, subject: str, chosen: dict[str, Candidate]) -> list[Cell]:
        """The winner of the first subject in pipeline/, all else in cells/."""
        cells = []
        for name, candidate in sorted(chosen.items(), key=lambda item: item[0] != "tuned"):
            first = name == "tuned" and subject == self.search_.subjects[0]
            if not first and self.config.report is None:
                continue
            pipeline = self.source.pipe = self.search_.apply(self.source.pipe, candidate)
            parts = self.search_.changed(pipeline, candidate)
            folder = "pipeline" if first else f"cells/{subject}-{name}"
            network = getattr(pipeline, "unet", None) or pipeline.transformer
            cell = Cell(subject, name, folder, candidate, held_bytes(network), sorted(parts))
            sampling = {str(self.config.steps): self.call}
            own = bool(own_code(self.files.pipeline)) or any(is_own(part) for part in parts.values())
            shown = self._shown()
            made = Made(len(self._rows()), self._cost(cell), self._captions(SHOWN), shown is not None)
            card = search_card(
                self.config, pipeline, sampling, self.search_.notes(candidate), own, self.files.pipeline, made
            )

            def fill(
                folder: Path,
                parts: dict[str, Any] = parts,
                card: str = card,
                shown: Image.Image | None = shown,
            ) -> None:
                write_variant(self.files.pipeline, folder, parts, {str(self.config.steps): self.call}, card)
                put_beside(folder, self.config, shown)

            write_folder(self.run / folder, fill)
            cells.append(cell)
        return cells

    def _shown(self) -> Image.Image | None:
        """Pictures of the source's pipeline for its card; None where they are not finite."""
        try:
            made = self._pictures(SHOWN, 2 * self.config.seed + 1)
        except NotFinite:
            return None
        return rows_image({f"{self.config.steps} steps": made})

    def _rows(self) -> list[dict[str, Any]]:
        path = self.run / LOG
        if not path.exists():
            return []
        remedy = "delete it and repeat the command, the search then starts anew"
        return [
            fitting(row, f"{path}: step {row['step']}", TrialRow, remedy=remedy) for _, row in log_lines(path)
        ]

    def _trials(self, subject: str, phase: str) -> list[Trial]:
        rows = (r for r in self._rows() if (r["subject"], r["phase"]) == (subject, phase))
        return [Trial(r["candidate"], r["fitness"]) for r in rows]

    def _cost(self, winner: Cell) -> dict[str, Any]:
        """What the search took, for comparisons: nothing was trained."""
        return {
            "candidates": len(self._rows()),
            "seconds": round(sum(r["seconds"] for r in self._rows()), 1),
            "searched_numbers": sum(len(v) for v in winner.candidate.values()),
            "device": f"1 x {device_name(self.device)}",
        }
