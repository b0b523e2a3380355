"""Schedulers and pipelines that exports need and diffusers lacks, each one self-contained file; and the exporter."""
