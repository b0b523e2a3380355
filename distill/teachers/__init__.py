"""The embedded teachers: their folders, and the data that they were trained on."""

from pathlib import Path

TEACHERS = Path(__file__).parent
EMBEDDED = {"emoji-sd": TEACHERS / "emoji_sd", "fashion-edm": TEACHERS / "fashion_edm"}
TRAINED_ON = {"emoji-sd": "emoji", "fashion-edm": "fashion-mnist"}
