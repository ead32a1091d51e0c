"""What a config names ends in commands of a shell: as words, whatever characters they are made of.

A config is trusted, as a Makefile is; values of columns, names of files and labels often come from others.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cellformers.io.files import read_table

ROOT = Path(__file__).parents[2]
PWN = "touch pwned"
ODD = f"""it's "a" $({PWN}) `{PWN}`; {PWN} & | > < * ? ~ # ! \\ %s {{x}} $HOME -rf é"""
PLAIN = ODD.replace("|", "/")  # which separates the fields of published numbers
# Snakemake reads braces in names of files as wildcards
FILE = f"""it's "a" $({PWN}) `{PWN}`; {PWN} & | > < ~ # ! %s $HOME -rf é.csv"""

pytestmark = pytest.mark.workflow


def snakemake(folder: Path, config: dict[str, object], *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--directory",
        str(folder),
    ]
    return subprocess.run(
        [*command, "--configfile", str(folder / "config.yaml"), "--cores", "1", *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def config(**dataset: object) -> dict[str, object]:
    return {
        "datasets": {"a": {"path": FILE, "genes_in_rows": False, "label": ODD, "batch": "-x", **dataset}},
        "corpora": {"a": {"datasets": ["a"]}},
        "vocabularies": {"own": {"corpus": "a"}},
        "models": {"small": {"vocabulary": "own", "pretrain": {"steps": 2}}},
        "embeddings": {"small": {"model": "small", "states": ODD}},
        "benchmarks": {
            "b": {
                "task": "cells", "train": ["a"], "label": ODD, "unit": "--help", "note": ODD, "question": ODD,
                "citation": ODD,
                "published": [{"metric": "accuracy", "value": 0.5, "source": PLAIN, "protocol": PLAIN}],
            }
        },
    }  # fmt: skip


def write_counts(folder: Path) -> None:
    genes = [f"ENSG{i:011d}" for i in range(1, 31)]
    rows = [f"cell{i}," + ",".join(str((i * k) % 7 + 1) for k in range(30)) for i in range(20)]
    (folder / FILE).write_text(",".join(["", *genes]) + "\n" + "\n".join(rows) + "\n")
    labels = [f"cell{i},{i % 3},{i % 2},-o" for i in range(20)]
    quoted = ODD.replace('"', '""')
    (folder / f"labels {FILE}").write_text(f'"$({PWN})","{quoted}","--help",-x\n' + "\n".join(labels) + "\n")


def test_commands_hold_every_name_as_one_word(tmp_path: Path) -> None:
    """The words of each command, as a shell takes it apart; nothing is left over that it would run."""
    write_counts(tmp_path)
    where = {ODD: [ODD, "-v", ""]}
    done = snakemake(
        tmp_path, config(labels={"path": f"labels {FILE}", "key": f"$({PWN})"}, where=where, layer=ODD),
        "--dry-run", "--printshellcmds",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "pwned").exists()
    text = done.stdout + done.stderr
    commands = [line.partition("Shell command: ")[2] for line in text.splitlines()]
    commands = [command for command in commands if command.startswith("cellformers ")]
    assert len(commands) > 20
    script = "cellformers() { printf '%s\\n' called; }\n" + "\n".join(
        c.partition(" 2> ")[0] for c in commands
    )
    shell = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert shell.stdout.count("called") == len(commands), shell.stderr
    assert shell.stderr == ""  # no other word was taken for a command
    assert not (tmp_path / "pwned").exists()
    ingest = shlex.split(next(line for line in commands if " ingest " in line))
    assert {FILE, ODD, f"labels {FILE}", f"$({PWN})"} <= set(ingest)
    qc = shlex.split(next(line for line in commands if " qc " in line))
    assert [f"{ODD}={value}" for value in where[ODD]] == [
        qc[i + 1] for i, word in enumerate(qc) if word == "--where"
    ]
    score = shlex.split(next(line for line in commands if " evaluate " in line))
    assert f"accuracy|0.5|{PLAIN}||{PLAIN}" in score


def test_a_run_in_folders_of_odd_names_runs_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / f"a folder's $({PWN})"
    folder.mkdir()
    write_counts(folder)
    given = config(labels={"path": f"labels {FILE}", "key": f"$({PWN})"}, label=ODD)
    results = f"results of `{PWN}`; {PWN}"
    done = snakemake(folder, given | {"pathvars": {"results": results}}, "--until", "columns", "qc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.rglob("pwned"))
    cells = read_table(folder / results / "a" / "cells.parquet")
    assert cells[ODD].to_pylist()[:4] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "name", ["$(touch pwned)", "a b", "../a", "a/b", "-x", "", ".a", "a\nb", "a;b", "é", "{a}"]
)
def test_names_of_a_config_are_plain(name: str) -> None:
    """They are names of folders and of wildcards."""
    from cellformers.config import load
    from cellformers.errors import UserError

    for section, entry in (
        ("datasets", {"path": "x.h5ad"}),
        ("models", {"path": "m"}),
        ("corpora", {"datasets": ["a"]}),
    ):
        values = {"datasets": {"a": {"path": "x.h5ad"}}}
        values.setdefault(section, {})[name] = entry
        with pytest.raises(UserError, match="names are made of letters"):
            load(values)


def test_a_config_is_a_program_to_snakemake_and_data_to_doctor(tmp_path: Path) -> None:
    """Snakemake fills templates of yte in config files in: docs/security.md says so, and advises `doctor`."""
    write_counts(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(
        "__use_yte__: true\n__definitions__:\n  - open('ran', 'w').close()\ndatasets: {a: {path: x.h5ad}}\n"
    )
    command = [sys.executable, "-m", "cellformers.cli", "doctor", "--config", str(path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    assert not (tmp_path / "ran").exists()
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--directory",
        str(tmp_path),
    ]
    subprocess.run(
        [*command, "--configfile", str(path), "--dry-run"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (tmp_path / "ran").exists()
    assert "__use_yte__" in (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
