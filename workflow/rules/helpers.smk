# The command that rules call; its flags, folders and resources, as rules ask for them.
import shlex
import shutil
import sys

# Called by its path (.venv/bin/snakemake), Snakemake would not find the command installed beside it. One that the PATH
# has comes first: that of a conda environment of a rule, or a wrapper for a container.
BESIDE = Path(sys.executable).with_name("cellformers")
shell.prefix(f"export PATH=$PATH:{shlex.quote(str(BESIDE.parent))}; ")
first = shutil.which("cellformers")
if first and BESIDE.exists() and not BESIDE.samefile(first):
    logger.warning(f"Rules call {first}, which the PATH has in front of {BESIDE}")

# MB and minutes that suffice however many cells there are, where a method learns from 50,000 at most or compares 20,000
MOST_MEMORY, MOST_MINUTES, COMPARED_CELLS = 8000, 600, 20_000


def flags(**options):
    """Command-line flags for the options that are set."""
    words = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [f"{flag} {shlex.quote(str(item))}" for item in value]
        elif value is not None and value is not False:
            words.append(f"{flag} {shlex.quote(str(value))}")
    return " ".join(words)


def named(names, paths):
    """NAME=PATH words of a command line."""
    return [f"{name}={path}" for name, path in zip(names, paths)]


def size_mb(input, needed):
    """The size of the input; not looked up where it does not matter, which saves a third of a large plan's time."""
    return input.size_mb if needed else 0


def memory(base_mb, per_input_mb=0.0, most=lambda wildcards: None):
    """A resource function: base plus a share of the input's size, `most` at most, doubled at each retry."""

    def mem_mb(wildcards, input, attempt):
        needed = base_mb + per_input_mb * size_mb(input, per_input_mb)
        return int(min(needed, most(wildcards) or needed) * 2 ** (attempt - 1))

    return mem_mb


def minutes(base, per_input_gb=0.0, most=lambda wildcards: None):
    """A resource function: base plus a share of the input's size, `most` at most, doubled at each retry."""

    def runtime(wildcards, input, attempt):
        needed = base + per_input_gb * size_mb(input, per_input_gb) / 1024
        return int(min(needed, most(wildcards) or needed) * 2 ** (attempt - 1))

    return runtime


def most_memory(wildcards):
    """MOST_MEMORY, or None where all cells are held."""
    spec = CONFIG.benchmarks.get(wildcards.get("benchmark"))
    if isinstance(spec, MixingBenchmark):
        return MOST_MEMORY if spec.max_cells <= COMPARED_CELLS else None
    if isinstance(spec, CellBenchmark):
        features = method_features(wildcards.benchmark, wildcards.method)
        return MOST_MEMORY if features in ("embedding", "pca_hvg", "log_counts", "rank_only") else None
    return None


def most_minutes(wildcards):
    """MOST_MINUTES, or None where all cells are held."""
    return MOST_MINUTES if most_memory(wildcards) else None


def folder_of(name):
    """A parameter function: the folder that the first file of an input lies in."""

    def folder(wildcards, input):
        return str(Path(input[name][0] if isinstance(name, str) else input[name]).parent)

    return folder


def ingest_options(dataset):
    """A parameter function, as braces in a text would be taken for wildcards: the flags of the ingest of a dataset."""
    options = flags(
        shards=dataset.shards,
        deposit=dataset.deposit,
        part=dataset.part if dataset.deposit else None,
        layer=dataset.layer,
        raw=dataset.raw,
        round=dataset.round,
        make_unique=dataset.make_unique,
        genes_in_rows=dataset.genes_in_rows is True,
        cells_in_rows=dataset.genes_in_rows is False,
        gene_column=dataset.gene_column,
        cell_column=dataset.cell_column,
        labels=dataset.labels and dataset.labels.path,
        key=dataset.labels and dataset.labels.key,
    )
    return lambda wildcards: options
