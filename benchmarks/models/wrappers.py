"""What a model that also sees images is served with: special tokens, and how its images and videos are made ready."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 2048
"""Tokens of the tokenizer; the special ones come behind them."""
PLACES = 16
"""Rows of the embedding for special tokens."""


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """The files of a wrapper beside the model.

    Attributes:
        tokens: special tokens; those that have a name in config.json under that name.
        image: what preprocessor_config.json says.
        video: what video_preprocessor_config.json says; nothing for none.
    """

    tokens: Mapping[str, str]
    image: Mapping[str, Any]
    video: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, int]:
        """Return what config.json says about the special tokens."""
        return {key: VOCABULARY + place for place, key in enumerate(self.tokens) if key.endswith("_id")}

    def write(self, folder: Path) -> None:
        """Add the special tokens to the tokenizer of a folder, and write the other files."""
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        same = tokenizer["added_tokens"][0]
        added = [{**same, "id": VOCABULARY + place, "content": it} for place, it in enumerate(self.tokens.values())]
        tokenizer["added_tokens"] += added
        path.write_text(json.dumps(tokenizer), encoding="utf-8")
        for name, content in (("preprocessor_config.json", self.image), ("video_preprocessor_config.json", self.video)):
            if content:
                (folder / name).write_text(json.dumps(content), encoding="utf-8")


_SIZES: dict[str, Any] = {
    "size": {"shortest_edge": 256, "longest_edge": 1024}, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip

QWEN = Wrapper(
    tokens={
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    image={**_SIZES, "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"},
    video={**_SIZES, "video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"},
)
GLM = Wrapper(
    tokens={
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    },
    image={**_SIZES, "image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor"},
    video={**_SIZES, "video_processor_type": "Glm4vVideoProcessor", "processor_class": "Glm4vProcessor"},
)
KIMI = Wrapper(
    tokens={
        "image_token_id": "<|media_pad|>",
        "video_token_id": "<|kimi_k25_video_placeholder|>",
        "vision_start_token_id": "<|media_begin|>",
        "vision_end_token_id": "<|media_end|>",
    },
    image={
        "image_processor_type": "KimiK25FusedVisionProcessor",
        "media_proc_cfg": {
            "patch_size": 14, "merge_kernel_size": 2, "in_patch_limit": 64, "patch_limit_on_one_side": 8,
            "fixed_output_tokens": None, "in_patch_limit_each_frame": 64, "in_patch_limit_video": 64,
            "temporal_merge_kernel_size": 4, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        },
    },
)  # fmt: skip
