"""A pretrained transformer with a classification head and low-rank adapters.

LoRA: Hu et al., arXiv 2106.09685: a frozen linear layer W gets B A x of rank r beside it, B = 0 at
the start. Rank 8 on the query, key and value projections, and a head without a bias, has as many
parameters as the paper's Table 4 gives for Pythia (99K, 296K, 788K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from culpa.errors import OptionError
from culpa.experiments import weights
from culpa.experiments.data.folder import DataFolder

RANK = 8
ADAPTED = ("q_proj", "k_proj", "v_proj", "query_key_value")
BYTES = "bytes"
"""Instead of a model's name: a tiny Llama with random weights that reads bytes, for tests."""
HOW = "Download it from the Hugging Face hub: config.json, model.safetensors and the tokenizer."


class LowRank(nn.Module):
    """``base(x) + B A x``; only A ``[rank, in]`` and B ``[out, rank]`` are trained."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """As the linear layer."""
        return self.base(x) + (x @ self.A.T) @ self.B.T


class Classifier(nn.Module):
    """A language model's body, frozen but for its adapters, and a head on the last token."""

    def __init__(self, body: nn.Module, width: int, classes: int, rank: int) -> None:
        super().__init__()
        self.body = body.requires_grad_(False)
        for name, layer in list(body.named_modules()):
            parent, _, last = name.rpartition(".")
            if last in ADAPTED and isinstance(layer, nn.Linear):
                setattr(body.get_submodule(parent), last, LowRank(layer, rank))
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of texts ``[B, T]``, padded on the right."""
        hidden = self.body(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        last = attention_mask.sum(1) - 1
        return self.head(hidden[torch.arange(len(last)), last])


@dataclass(frozen=True)
class Language:
    """A model's tokenizer, or bytes where it is ``None``."""

    tokenizer: Any | None

    def __call__(self, texts: Sequence[str], length: int) -> dict[str, Tensor]:
        """The first ``length`` tokens of each text, padded on the right to that length."""
        rows = [self._ids(text)[:length] or [0] for text in texts]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}

    def _ids(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return list(text.encode())
        return [int(i) for i in self.tokenizer(text)["input_ids"]]


def classifier(
    name: str, seed: int, data: DataFolder, *, layers: int | None = None, rank: int = RANK
) -> tuple[Classifier, Language]:
    """A pretrained model of ``models/<name>`` by its first ``layers``; adapters and head are new.

    Raises:
        OptionError: if transformers is not installed, or the model is not there.
    """
    try:
        import transformers
    except ImportError as error:
        raise OptionError(
            "language models are read by transformers, which is not installed. Run: pip install"
            " 'culpa[transformers]'."
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == BYTES:
            config = transformers.LlamaConfig(
                vocab_size=256, hidden_size=16, intermediate_size=32, num_attention_heads=2,
                num_key_value_heads=1, num_hidden_layers=layers or 2,
            )  # fmt: skip
            # The default attention has no second derivatives.
            config._attn_implementation = "eager"  # pyright: ignore[reportPrivateUsage]
            body, tokenizer = transformers.LlamaModel(config), None
        else:
            folder = weights.find(data, name, HOW)
            body, tokenizer = _pretrained(transformers, folder, layers)
        model = Classifier(body, int(body.config.hidden_size), 2, rank)
    return model, Language(tokenizer)


def _pretrained(transformers: Any, folder: Path, layers: int | None) -> tuple[Any, Any]:
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    body = transformers.AutoModel.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True, **fewer
    )
    return body, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
