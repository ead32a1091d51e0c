"""The report: one HTML file that opens offline, on a desk or on a phone, and its figures as files.

    write_report(ReportSpec(datasets={"mine": DatasetFiles(folder=Path("results/mine"))}), "results/report.html")

What is not there (no model trained, no benchmark) is left out. Everything that comes from the user's files is
escaped, and the page forbids itself to load or run anything that it does not carry.
"""

from cellformers.report.page import write_report
from cellformers.report.spec import DatasetFiles, MapFile, ReportSpec, from_config

__all__ = ["DatasetFiles", "MapFile", "ReportSpec", "from_config", "write_report"]
