"""How far embeddings differ between processors: the same cells through the kernels of older ones, on this one.

    cd results
    python ../benchmarks/kernels.py --tokens atlas/tokens/atlas/0001-of-0002.parquet --vocabulary vocabularies/atlas

A model of V1-10M's shape with random weights embeds the cells in fp32 with every kernel that this processor has, and
with those of AVX2 and of SSE4 alone; `cellformers compare` says how far each is from the first.
"""

# ruff: noqa: E402
import sys

del sys.path[0]  # this folder holds a tokenize.py, which would hide the standard library's

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

from cellformers.compare import compare
from cellformers.models import checkpoints, layouts
from cellformers.models.bert_config import Config
from cellformers.provenance.surroundings import machine
from cellformers.vocabulary import Vocabulary

KERNELS = {
    "all": {},
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AVX2", "OPENBLAS_CORETYPE": "Haswell",
    },
    "SSE4": {
        "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Nehalem",
    },
}  # fmt: skip


def main() -> None:
    """Embed with each set of kernels and print the largest differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--vocabulary", type=Path, required=True)
    asked = parser.parse_args()
    print("processor:", ", ".join(machine()["features"] or ["unknown"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = Vocabulary.load(asked.vocabulary)
        shape = Config(
            vocab_size=vocabulary.size, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
            intermediate_size=512, max_position_embeddings=2048, hidden_act="relu", initializer_range=0.02,
        )  # fmt: skip
        model = folder / "model"
        model.mkdir()
        checkpoints.save(layouts.random_model(shape, seed=0), model)
        vocabulary.save(model / "vocabulary")
        for kernels, environment in KERNELS.items():
            output = folder / kernels / "embeddings.parquet"
            command = [
                "-m",
                "cellformers.cli",
                "embed",
                asked.tokens,
                "--model",
                model,
                "--mode",
                "cell",
                "-o",
                output,
            ]
            subprocess.run(
                [sys.executable, *map(str, command), "--quiet"], check=True, env=os.environ | environment
            )
            for unlike in compare(folder / "all", output.parent).unlike:
                print(f"{kernels}: {unlike.differences[0].text}")


if __name__ == "__main__":
    main()
