"""Step time and peak memory of our latent consistency distillation against a plain hand-written step.

    python scripts/benchmark_lcd_step.py [--teacher emoji-sd | --random] [--batch_size 32] [--steps 30] [--output FILE]

Both train the same network with the same batches, in float32. Times are taken in turns, ours, plain, ours, plain, ...,
and reported as medians with 20 % and 80 % quantiles, of the times and of the paired ratios. Memory is measured in
processes of their own: peak resident size on a CPU, torch.cuda.max_memory_allocated on CUDA. Beforehand both take some
steps with the same random numbers, and their losses must agree.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.data.sources import load_data
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.models.teacher import locate
from fewstep.distill.training.measure import environment, peak_mib, quantiles, seconds
from fewstep.distill.training.runner import Runner
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
MEMORY_RUNS, MEMORY_STEPS, WARM_UP = 3, 4, 2
METHOD = {
    "w_min": 2.0, "w_max": 10.0, "w_export": 7.5, "guidance_dim": 256, "num_ddim_timesteps": 50,
    "timestep_scaling": 10.0, "huber_c": 1e-3, "target_decay": 0.95,
}  # fmt: skip
OPTIMISER = {"learning_rate": 1e-4, "adam_weight_decay": 1e-2, "max_grad_norm": 1.0}


@dataclass
class Drawn:
    """posterior, noise (B, C, h, w); index, w (B,): the random numbers of one step."""

    posterior: Tensor
    index: Tensor
    w: Tensor
    noise: Tensor

    @classmethod
    def replayed(cls, draws: Draws, shape: torch.Size) -> "Drawn":
        """In the order in which our method draws them."""
        posterior = draws.normal(shape)
        index = draws.integers(0, METHOD["num_ddim_timesteps"])
        return cls(posterior, index, draws.uniform(METHOD["w_min"], METHOD["w_max"]), draws.normal(shape))

    @classmethod
    def fresh(cls, moments: Tensor) -> "Drawn":
        count, device = len(moments), moments.device
        posterior = torch.randn_like(moments[:, : moments.shape[1] // 2])
        index = torch.randint(0, METHOD["num_ddim_timesteps"], (count,), device=device)
        w = METHOD["w_min"] + (METHOD["w_max"] - METHOD["w_min"]) * torch.rand(count, device=device)
        return cls(posterior, index, w, torch.randn_like(posterior))


class PlainLCD:
    """Latent consistency distillation (arXiv 2310.04378) in plain torch: three networks and an optimiser."""

    def __init__(self, folder: str, device: torch.device):
        self.pipeline = StableDiffusionPipeline.from_pretrained(
            folder, dtype=torch.float32, safety_checker=None
        )
        scheduler = self.pipeline.scheduler
        assert scheduler.config.prediction_type == "epsilon"
        self.pipeline.to(device)
        for part in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.unet):
            part.requires_grad_(False)
        self.teacher = self.pipeline.unet
        config = {k: v for k, v in self.teacher.config.items() if not k.startswith("_")}
        self.student = UNet2DConditionModel(**{**config, "time_cond_proj_dim": METHOD["guidance_dim"]})
        self.student.load_state_dict(self.teacher.state_dict(), strict=False)
        torch.nn.init.zeros_(self.student.time_embedding.cond_proj.weight)
        self.student.to(device).train()
        self.target = copy.deepcopy(self.student).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.student.parameters(),
            lr=OPTIMISER["learning_rate"],
            weight_decay=OPTIMISER["adam_weight_decay"],
        )
        self.alphas = scheduler.alphas_cumprod.sqrt().to(device)
        self.sigmas = (1 - scheduler.alphas_cumprod).sqrt().to(device)
        self.skip = len(self.alphas) // int(METHOD["num_ddim_timesteps"])

    def loss(self, moments: Tensor, text: Tensor, empty: Tensor, d: Drawn) -> Tensor:
        mean, logvar = moments.chunk(2, dim=1)
        z0 = (mean + torch.exp(0.5 * logvar) * d.posterior) * self.pipeline.vae.config.scaling_factor
        start = (d.index + 1) * self.skip - 1
        end = (start - self.skip).clamp(min=0)
        z = self.at(self.alphas, start) * z0 + self.at(self.sigmas, start) * d.noise
        embedding = self.embed(d.w)
        prediction = self.consistency(self.student, z, start, text, embedding)
        with torch.no_grad():
            states = torch.cat([text, empty.expand(len(text), -1, -1)])
            eps = self.teacher(torch.cat([z, z]), torch.cat([start, start]), states, return_dict=False)[0]
            with_text, without = eps.chunk(2)
            eps = with_text + d.w.view(-1, 1, 1, 1) * (with_text - without)
            x0 = (z - self.at(self.sigmas, start) * eps) / self.at(self.alphas, start)
            z_end = self.at(self.alphas, end) * x0 + self.at(self.sigmas, end) * eps
            goal = self.consistency(self.target, z_end, end, text, embedding)
        c = METHOD["huber_c"]
        return (torch.sqrt((prediction - goal) ** 2 + c**2) - c).mean()

    def consistency(self, network: Any, z: Tensor, t: Tensor, text: Tensor, embedding: Tensor) -> Tensor:
        eps = network(z, t, text, timestep_cond=embedding, return_dict=False)[0]
        x0 = (z - self.at(self.sigmas, t) * eps) / self.at(self.alphas, t)
        s = (METHOD["timestep_scaling"] * t).view(-1, 1, 1, 1)
        return 0.25 / (s**2 + 0.25) * z + s / torch.sqrt(s**2 + 0.25) * x0

    def embed(self, w: Tensor) -> Tensor:
        half = int(METHOD["guidance_dim"]) // 2
        exponent = torch.arange(half, device=w.device) / (half - 1)
        angles = 1000 * w[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) * exponent)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)

    @staticmethod
    def at(table: Tensor, t: Tensor) -> Tensor:
        return table[t].view(-1, 1, 1, 1)

    def step(self, moments: Tensor, text: Tensor, empty: Tensor, drawn: Drawn | None = None) -> Tensor:
        loss = self.loss(moments, text, empty, drawn or Drawn.fresh(moments))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), OPTIMISER["max_grad_norm"])
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            mu = METHOD["target_decay"]
            for average, p in zip(self.target.parameters(), self.student.parameters(), strict=True):
                average.mul_(mu).add_(p, alpha=1 - mu)
        return loss.detach()


def our_runner(folder: str, output: Path, batch_size: int) -> Runner:
    """The project's own runner, built and ready for its first iteration; `output` stays almost empty."""
    tree = {
        "output_dir": str(output),
        "teacher": {"path": folder},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": "lcd", **METHOD},
        "train_batch_size": batch_size,
        **OPTIMISER,
    }
    runner = Runner(load_config(tree))
    runner._build(None)
    return runner


def batch_of(runner: Runner, iteration: int) -> tuple[Tensor, Tensor, Tensor]:
    """The iteration's posterior moments, text states and empty text states, on the runner's device."""
    batch = runner.batches.micro_batches(iteration)[0]
    assert batch.latents is not None and batch.condition is not None
    name = "encoder_hidden_states"
    return batch.latents, batch.condition.arguments[name], batch.condition.empty[name]


def compare_losses(runner: Runner, plain: PlainLCD, steps: int = 3) -> list[tuple[float, float]]:
    """(ours, plain) of the first steps, both with our random numbers; each step also updates weights and target."""
    pairs = []
    for iteration in range(steps):
        moments, text, empty = batch_of(runner, iteration)
        draws = runner.batches.micro_batches(iteration)[0].draws
        drawn = Drawn.replayed(draws, torch.Size((moments.shape[1] // 2, *moments.shape[2:])))
        pairs.append(
            (float(runner._iteration(iteration)["loss"]), float(plain.step(moments, text, empty, drawn)))
        )
    return pairs


def paired_times(runner: Runner, plain: PlainLCD, steps: int, first: int) -> list[tuple[float, float]]:
    """Seconds of (ours, plain) per step, taken in turns."""

    pairs = []
    for iteration in range(first, first + WARM_UP + steps):
        batch = batch_of(runner, iteration)
        ours = seconds(lambda i=iteration: runner._iteration(i))
        pairs.append((ours, seconds(lambda b=batch: plain.step(*b))))
    return pairs[WARM_UP:]


def measure_memory(variant: str, folder: str, work: Path, batch_size: int) -> dict[str, float]:
    """In this process: MiB before anything is built, and at the peak of building and some steps."""
    before = peak_mib()
    if variant == "ours":
        runner = our_runner(folder, work / "memory", batch_size)
        for iteration in range(MEMORY_STEPS):
            runner._iteration(iteration)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plain, batch = PlainLCD(folder, device), [t.to(device) for t in torch.load(work / "batch.pt")]
        for _ in range(MEMORY_STEPS):
            plain.step(*batch)
    return {"before": before, "peak": peak_mib()}


def memory(args: argparse.Namespace, folder: str, work: Path) -> dict[str, list[dict[str, float]]]:
    """Measurements of both variants, each in a process of its own, in turns."""
    out: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for _ in range(MEMORY_RUNS):
        for variant, found in out.items():
            options = {"variant": variant, "work": work, "teacher": folder}
            options |= {"batch_size": args.batch_size, "threads": args.threads}
            words = [word for k, v in options.items() for word in (f"--{k}", str(v))]
            done = subprocess.run(
                [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return out


def random_pipeline(folder: Path) -> str:
    """A pipeline of the shape of configs/emoji/teacher.yaml with random weights, saved to `folder`."""
    import yaml
    from diffusers import DDIMScheduler
    from fewstep.distill.commands.teacher_stages import network_of, stages_of
    from fewstep.distill.config.run import StudentSettings
    from fewstep.distill.pretrain.autoencoder import Autoencoder
    from fewstep.distill.pretrain.settings import TextEncoderSettings
    from fewstep.distill.pretrain.text_encoder import train_tokenizer
    from fewstep.distill.training.contract import Parts
    from transformers import CLIPTextConfig, CLIPTextModel

    tree = yaml.safe_load((ROOT / "configs" / "emoji" / "teacher.yaml").read_text())
    stages = {
        k: {s: v for s, v in stage["method"].items() if s != "name"} for k, stage in tree["stages"].items()
    }
    text = TextEncoderSettings(**stages["text_encoder"])
    captions = load_data("emoji-noto", resolution=32).captions
    tokenizer = train_tokenizer(captions, text.vocabulary_size, text.max_length)
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=text.hidden_size, intermediate_size=4 * text.hidden_size,
            num_hidden_layers=text.num_layers, num_attention_heads=text.num_heads,
            max_position_embeddings=text.max_length, **special,
        )
    )  # fmt: skip
    autoencoder = Autoencoder.Settings(**stages["autoencoder"])
    StableDiffusionPipeline(
        vae=Autoencoder(autoencoder, Parts(None, StudentSettings(), [])).vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(cross_attention_dim=text.hidden_size, **network_of(tree, stages_of(tree))),
        scheduler=DDIMScheduler(**tree["scheduler"]),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def report(args: argparse.Namespace, folder: str, work: Path) -> dict[str, Any]:
    runner = our_runner(folder, work / "run", args.batch_size)
    plain = PlainLCD(folder, runner.accelerator.device)
    losses = compare_losses(runner, plain)
    times = paired_times(runner, plain, args.steps, first=len(losses))
    torch.save([t.cpu() for t in batch_of(runner, 0)], work / "batch.pt")
    found = memory(args, folder, work)
    grown = {k: [m["peak"] - m["before"] for m in v] for k, v in found.items()}
    return {
        "environment": environment(ROOT),
        "teacher": "random" if args.random else args.teacher,
        "parameters": sum(p.numel() for p in plain.student.parameters()),
        "batch_size": args.batch_size, "steps": args.steps, "threads": torch.get_num_threads(),
        "losses": losses,
        "loss_difference": max(abs(a - b) for a, b in losses),
        "seconds": {"ours": quantiles([a for a, _ in times]), "plain": quantiles([b for _, b in times])},
        "time_ratio": quantiles([a / b for a, b in times]),
        "mib": {
            k: {"peak": statistics.median(m["peak"] for m in v), "above_start": statistics.median(grown[k])}
            for k, v in found.items()
        },
        "memory_ratio": quantiles([a["peak"] / b["peak"] for a, b in zip(*found.values(), strict=True)]),
        "memory_ratio_above_start": quantiles([a / b for a, b in zip(*grown.values(), strict=True)]),
    }  # fmt: skip


def as_text(r: dict[str, Any]) -> str:
    def three(q: dict[str, float], unit: float = 1) -> str:
        return f"{q['median'] * unit:.4g} ({q['q20'] * unit:.4g} to {q['q80'] * unit:.4g})"

    e, m = r["environment"], r["mib"]
    short = e["commit"][:12] + "+" * e["commit"].endswith("+")
    return "\n".join(
        [
            f"{e['device']}, torch {e['torch']}, diffusers {e['diffusers']}, commit {short}",
            f"teacher {r['teacher']}, {r['parameters']:,} parameters, batch {r['batch_size']}, {r['threads']} threads",
            "losses with the same random numbers (ours, plain): "
            + "; ".join(f"{a:.7f}, {b:.7f}" for a, b in r["losses"]),
            f"|difference| at most {r['loss_difference']:.2g}",
            f"step, ms: ours {three(r['seconds']['ours'], 1000)}, plain {three(r['seconds']['plain'], 1000)}",
            f"time, ours / plain, paired over {r['steps']} steps: {three(r['time_ratio'])}",
            f"peak MiB: ours {m['ours']['peak']:.0f}, plain {m['plain']['peak']:.0f}; above the imports: "
            f"{m['ours']['above_start']:.0f}, {m['plain']['above_start']:.0f}",
            f"memory, ours / plain: {three(r['memory_ratio'])}; above the imports: "
            f"{three(r['memory_ratio_above_start'])}",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="emoji-sd", help="embedded name or Stable Diffusion folder")
    parser.add_argument("--random", action="store_true", help="the emoji teacher's shape with random weights")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30, help="paired steps that are timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--variant", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.variant:
        print(json.dumps(measure_memory(args.variant, args.teacher, args.work, args.batch_size)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["FEWSTEP_CACHE"] = str(work / "cache")
        try:
            folder = random_pipeline(work / "pipeline") if args.random else locate(args.teacher)
            result = report(args, folder, work)
        except UserError as error:
            print(f"benchmark: error: {error}", file=sys.stderr)
            return 2
    print(as_text(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
