"""Models as others publish them: made and saved by transformers, or rewritten as NVIDIA's export writes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

COMMON = {"hidden_act": "relu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
V1_10M = {
    "vocab_size": 25426, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "intermediate_size": 512, "max_position_embeddings": 2048, **COMMON,
}  # fmt: skip
V2_104M = {  # and V2-104M_CLcancer
    "vocab_size": 20275, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 4096, **COMMON,
}  # fmt: skip
V2_316M = {
    **V2_104M, "hidden_size": 1152, "num_hidden_layers": 18, "num_attention_heads": 18, "intermediate_size": 4608,
}  # fmt: skip
SMALL = {
    "vocab_size": 90, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 80, "max_position_embeddings": 64, **COMMON,
}  # fmt: skip


def publish(
    folder: Path, shape: dict[str, Any] | None = None, *, kind: str = "ForMaskedLM", **changes: Any
) -> Any:
    """A Bert{kind} of transformers with random weights, none of them 0 or 1, saved as it saves itself."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.BertConfig(**{**(shape or SMALL), **changes})
    model = getattr(transformers, f"Bert{kind}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.1)
    model.save_pretrained(folder)
    return model


TE_NAMES = {
    "attention.output.dense": "self_attention.proj",
    "attention.output.LayerNorm": "layernorm",
    "intermediate.dense": "layernorm_mlp.fc1",
    "output.dense": "layernorm_mlp.fc2",
    "output.LayerNorm": "layernorm_mlp.layer_norm",
}


def as_te(tensors: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Tensors of Hugging Face's layout as NVIDIA's export names and orders them, tied copies included."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".attention.self.")
        stem, kind = name.rsplit(".", 1)
        if not rest:
            before, inside, after = stem.partition("encoder.layer.")
            number, _, part = after.partition(".")
            made[f"{before}{inside}{number}.{TE_NAMES[part]}.{kind}" if inside else name] = tensor
        elif rest.startswith("query"):
            whole = torch.cat(
                [tensors[f"{layer}.attention.self.{p}.{kind}"] for p in ("query", "key", "value")]
            )
            rows = whole.view(3, heads, -1, *whole.shape[1:]).transpose(0, 1)
            made[f"{layer}.self_attention.qkv.{kind}"] = rows.reshape(whole.shape).contiguous()
    if "cls.predictions.bias" in made:
        made["cls.predictions.decoder.weight"] = made["bert.embeddings.word_embeddings.weight"].clone()
        made["cls.predictions.decoder.bias"] = made["cls.predictions.bias"].clone()
    return made


def publish_te(folder: Path, shape: dict[str, Any] | None = None, **options: Any) -> Any:
    """As `publish`, but exported as NVIDIA does it."""
    model = publish(folder, shape, **options)
    weights, config = folder / "model.safetensors", folder / "config.json"
    save_file(as_te(load_file(weights), (shape or SMALL)["num_attention_heads"]), weights)
    content = json.loads(config.read_text()) | {
        "use_te_layers": True,
        "fuse_qkv_params": True,
        "micro_batch_size": None,
        "framework": "pytorch",
        "torch_dtype": "float32",
        "auto_map": {
            "AutoConfig": "geneformer.TEBertConfig",
            "AutoModelForMaskedLM": "geneformer.BertForMaskedLM",
        },
    }
    config.write_text(json.dumps(content, indent=2, sort_keys=True))
    return model


def as_pickle(folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Replace model.safetensors by pytorch_model.bin with the same tensors, and others."""
    weights = folder / "model.safetensors"
    torch.save({**load_file(weights), **(extra or {})}, folder / "pytorch_model.bin")
    weights.unlink()


def as_shards(folder: Path, n: int = 3, *, pickled: bool = False) -> None:
    """Replace model.safetensors by an index and shards."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    base, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    index = {}
    for number in range(n):
        name = f"{base}-{number + 1:05}-of-{n:05}.{end}"
        part = {key: tensors[key] for key in sorted(tensors)[number::n]}
        (torch.save if pickled else save_file)(part, folder / name)
        index |= dict.fromkeys(part, name)
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / f"{base}.{end}.index.json").write_text(json.dumps(content))


def sequences(lengths: Any, vocab_size: int = 90, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (n,), generator=generator) for n in lengths]


def pack(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(parts), torch.tensor([0, *[len(p) for p in parts]]).cumsum(0)


def pad(parts: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in parts], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}
