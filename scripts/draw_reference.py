"""A model's own pictures as reference of `fewstep compare`: OUTPUT/pictures/{train,holdout}, and its pipeline.

    python scripts/draw_reference.py emoji-sd --lora style.safetensors --prompts prompts.txt --output runs/reference

OUTPUT/teacher is the model with the LoRA in its weights, which `compare` scores at few steps beside its students. Noise
seeds start at 10^9, where no evaluation draws. A picture that is there already is kept.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from fewstep.distill.checkpoint import write_file, write_folder
from fewstep.distill.data.prompts import read_prompts
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.evaluate import choose_device
from fewstep.distill.settings import TeacherSettings
from fewstep.distill.teacher import LatentTeacher, Teacher
from fewstep.distill.teacher_data import own_guidance
from PIL import Image

SEED = 10**9


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--lora")
    parser.add_argument("--prompts", required=True, help="each gets --copies pictures in pictures/train")
    parser.add_argument("--holdout_prompts", help="in pictures/holdout")
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, help="default: the model's own")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)

    teacher = Teacher.load(TeacherSettings(args.model, lora=args.lora))
    if not isinstance(teacher, LatentTeacher):
        raise UserError(f"model: {args.model} takes no prompts")
    pipe, scale = teacher.pipeline, args.guidance_scale
    if scale is None:
        scale = own_guidance(args.model, type(pipe).__name__)
    call = {"guidance_scale": scale, **teacher.call()}

    def fill(folder: Path) -> None:
        pipe.save_pretrained(folder)
        (folder / "sampling.json").write_text(json.dumps({"default": call}, indent=2) + "\n")

    write_folder(args.output / "teacher", fill)
    pipe.to(choose_device(None)).set_progress_bar_config(disable=True)
    first = SEED
    for split, source in (("train", args.prompts), ("holdout", args.holdout_prompts)):
        if source is None:
            continue
        prompts = [p for p in read_prompts(source) for _ in range(args.copies)]
        folder = args.output / "pictures" / split
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(prompts), args.batch_size):
            rows = range(start, min(start + args.batch_size, len(prompts)))
            files = [folder / f"{i:06d}.png" for i in rows]
            if all(file.is_file() for file in files):
                continue
            generators = [torch.Generator().manual_seed(first + i) for i in rows]
            images = pipe(
                [prompts[i] for i in rows], num_inference_steps=args.steps, generator=generators, **call
            ).images
            for file, image in zip(files, images, strict=True):
                save(image, file)
            print(f"{split}: {rows.stop} of {len(prompts)}", flush=True)
        lines = [json.dumps({"file_name": f"{i:06d}.png", "text": p}) for i, p in enumerate(prompts)]
        write_file(folder / "metadata.jsonl", "\n".join(lines) + "\n")
        first += len(prompts)


def save(image: Image.Image, file: Path) -> None:
    """Whole or not at all."""
    part = file.with_suffix(".part")
    image.save(part, format="PNG")
    part.replace(file)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"draw_reference: error: {error}")
