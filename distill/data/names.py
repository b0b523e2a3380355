"""The data sets that are known by name."""

STYLES = {"emoji": ("noto", "twemoji"), "emoji-noto": ("noto",), "emoji-twemoji": ("twemoji",)}
CLASSED = ("fashion-mnist", "cifar10")
