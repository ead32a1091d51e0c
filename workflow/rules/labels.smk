# Labels of genes: which table, class and groups a benchmark reads.


def label_table(benchmark):
    """The table of labelled genes of a benchmark."""
    labels = CONFIG.benchmarks[benchmark].labels
    if labels.deposit:
        vocabulary = vocabulary_of(benchmark_model(benchmark))
        return f"<results>/labels/{labels.deposit}.{labels.part}.{vocabulary}.csv"
    return "<results>/simulated/gene_labels.csv" if labels.simulated else str(labels.path)


def positive_class(benchmark):
    labels = CONFIG.benchmarks[benchmark].labels
    if labels.positive is None and labels.deposit:
        return read_deposit(labels.deposit).parts[labels.part].positive
    return labels.positive or "sensitive"


def group_column(benchmark):
    """The simulated factors are matched pairs; torn apart, a method without information scores below chance."""
    labels = CONFIG.benchmarks[benchmark].labels
    return "pair" if labels.simulated else labels.group
